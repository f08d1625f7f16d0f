"""Infotexts of A1111, Forge and other programs: parsing, conversion to settings and notes on unsupported settings."""

import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.recipe import Recipe, format_infotext, write_png
from lora_diffusion.prompts.image_metadata import decode_comment, read_infotext
from lora_diffusion.prompts.infotext import (
    Infotext,
    convert_settings,
    parse_hashes,
    parse_infotext,
    quote_value,
)

FORGE = """a lighthouse, (stormy:1.2) <lora:ink:0.8>
BREAK oil on canvas
Negative prompt: blurry, (worst quality:1.4)
text, watermark
Steps: 24, Sampler: Euler a, CFG scale: 6.5, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned, RNG: CPU, Lora hashes: "ink: 1585b50b9d7d, wet, ink: 28f11be9dbf2", \
TI hashes: "bad: 0a1b2c3d4e5f", Version: v1.10.1"""

PLAIN = {"Steps": "20", "Sampler": "Euler", "CFG scale": "7", "Seed": "1", "Size": "64x64", "RNG": "CPU"}

# Windows line endings are converted, so texts with a carriage return do not parse back unchanged
texts = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]), max_size=60)
special_texts = st.text(st.sampled_from('ab ,:\n"\\{}[]\t\r'), max_size=12)
keys = st.text(string.ascii_letters + string.digits + "_ -/", min_size=2, max_size=12).filter(
    lambda key: (key[0].isalnum() or key[0] == "_") and key == key.strip()
)
tables = st.dictionaries(keys, texts | special_texts, min_size=3, max_size=8)


def has_negative_label(prompt: str) -> bool:
    return any(line.lstrip().startswith("Negative prompt:") for line in prompt.split("\n"))


def assemble_infotext(prompt: str, negative: str, table: dict[str, str]) -> str:
    last = ", ".join(f"{key}: {quote_value(value)}" for key, value in table.items())
    return f"{prompt}\nNegative prompt: {negative}\n{last}" if negative else f"{prompt}\n{last}"


def convert(changes: dict[str, str]) -> tuple[dict[str, object], tuple[str, ...]]:
    return convert_settings(Infotext(prompt="a cat", settings={**PLAIN, **changes}), source="x.png")


@given(texts.filter(lambda text: not has_negative_label(text)), texts, tables)
def test_a_formatted_infotext_parses_back(prompt: str, negative: str, table: dict[str, str]) -> None:
    info = parse_infotext(assemble_infotext(prompt, negative, table), source="x.png")
    assert (info.prompt, info.negative_prompt, info.settings) == (prompt, negative, table)


@given(tables, tables)
def test_of_equal_keys_the_last_counts(first: dict[str, str], second: dict[str, str]) -> None:
    pairs = [*first.items(), *((key, f"earlier {value}") for key, value in second.items()), *second.items()]
    line = ", ".join(f"{key}: {quote_value(value)}" for key, value in pairs)
    assert parse_infotext(f"a cat\n{line}", source="x.png").settings == {**first, **second}


@given(texts | special_texts)
def test_any_text_parses_or_raises_config_error(text: str) -> None:
    try:
        parse_infotext(text, source="x.png")
    except ConfigError as error:
        assert str(error).startswith("x.png: ")


@given(tables, st.text("0123456789abcdef", min_size=12, max_size=12))
def test_a_recipe_is_restored_from_its_infotext(table: dict[str, str], digest: str) -> None:
    model, *_ = table.values()
    config = GenerateConfig(
        prompt="a cat", negative_prompt="rain\nfog", seed=7, guidance_scale=6.5, width=64, height=32
    )
    entry = BlendEntry(path="x.safetensors", name="wet, ink: two", hash=digest + "ff")
    recipe = Recipe(base=model, base_hash="0123456789abcdef", adapters=(entry,), settings=config)
    info = parse_infotext(format_infotext(recipe), source="x.png")
    assert (info.model, info.model_hash, info.lora_hashes) == (model, "0123456789", {"wet, ink: two": digest})
    again, notes = convert_settings(info, source="x.png")
    assert GenerateConfig(**again) == config.model_copy(update={"prompt": info.prompt})
    assert notes == ()


def test_a_forge_infotext_is_parsed_completely() -> None:
    info = parse_infotext(FORGE, source="x.png")
    assert info.prompt == "a lighthouse, (stormy:1.2) <lora:ink:0.8>\nBREAK oil on canvas"
    assert info.negative_prompt == "blurry, (worst quality:1.4)\ntext, watermark"
    assert info.lora_hashes == {"ink": "1585b50b9d7d", "wet, ink": "28f11be9dbf2"}
    assert info.ti_hashes == {"bad": "0a1b2c3d4e5f"}
    assert (info.model, info.model_hash) == ("v1-5-pruned", "6ce0161689")
    assert list(info.settings)[:3] == ["Steps", "Sampler", "CFG scale"]
    assert parse_infotext(FORGE.replace("\n", "\r\n") + "\r\n", source="x.png") == info
    assert convert_settings(info, source="x.png") == (
        {
            "prompt": info.prompt,
            "negative_prompt": info.negative_prompt,
            "seed": 965400086,
            "num_inference_steps": 24,
            "guidance_scale": 6.5,
            "width": 512,
            "height": 768,
            "scheduler": "euler-ancestral",
        },
        (),
    )


def test_a_json_table_is_one_value() -> None:
    civitai = 'Hashes: {"model": "6ce0161689", "lora:ink": "abc"}, Civitai resources: [{"type":"lora","weight":0.8}]'
    info = parse_infotext(f"a cat\nSteps: 20, {civitai}, Seed: 5, Note: [a, b", source="x.png")
    assert info.settings == {
        "Steps": "20",
        "Hashes": '{"model": "6ce0161689", "lora:ink": "abc"}',
        "Civitai resources": '[{"type":"lora","weight":0.8}]',
        "Seed": "5",
        "Note": "[a",
    }
    deep = parse_infotext(f"a cat\nSteps: 20, Seed: 5, Note: {'[' * 100_000}", source="x.png")
    assert len(deep.settings["Note"]) == 100_000


def test_templates_below_the_settings_line_are_settings() -> None:
    info = parse_infotext(f"{FORGE}\nTemplate:a {{cat|dog}},\nred: 1, aa: 2\nNegative Template: fog", source="x.png")
    assert info.prompt.startswith("a lighthouse")
    assert info.settings["Template"] == "a {cat|dog},\nred: 1, aa: 2"
    assert info.settings["Negative Template"] == "fog"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a cat\nSteps: 20, Seed: 1",
        "(masterpiece:1.2), (quality:1.4), (sharp:1.1), [foo:bar:3]",
        f"{FORGE}\nand then a prompt again",
        '{"prompt": "a cat", "steps": 20, "seed": 1}',
    ],
)
def test_a_text_without_a_final_settings_line_raises(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^x\.png: .*no line of settings; expected a last line such as 'Steps: 20"):
        parse_infotext(text, source="x.png")


def test_prompts_are_optional() -> None:
    assert parse_infotext("Steps: 1, Seed: 2, Size: 8x8", source="x").prompt == ""
    info = parse_infotext("Negative prompt:fog\nSteps: 1, Seed: 2, Size: 8x8", source="x")
    assert (info.prompt, info.negative_prompt) == ("", "fog")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Euler a", "Euler a"),
        ("a, b", '"a, b"'),
        ("C:/models", '"C:/models"'),
        ("é\n", '"é\\n"'),
        ('"a"', '"\\"a\\""'),
        ("", '""'),
    ],
)
def test_values_are_quoted_where_required(value: str, expected: str) -> None:
    assert quote_value(value) == expected


def test_text_without_a_hash_belongs_to_the_following_name() -> None:
    assert parse_hashes("a: 12ab, b, c: d: 34CD, e: none") == {"a": "12ab", "b, c: d": "34CD"}
    assert parse_hashes("") == {}


@pytest.mark.parametrize(
    ("sampler", "schedule", "scheduler", "unsupported_schedule"),
    [
        ("Euler a", "", "euler-ancestral", ""),
        ("Euler", "Automatic", "euler", ""),
        ("DDIM", "", "ddim", ""),
        ("DPM++ 2M", "", "dpm++", ""),
        ("DPM++ 2M", "Karras", "dpm++", "Karras"),
        ("DPM++ 2M Karras", "", "dpm++", "karras"),
        ("Euler SGM Uniform", "", "euler", "sgm uniform"),
        ("k_euler_ancestral", "", "euler-ancestral", ""),
        ("dpmpp_2m_karras", "", "dpm++", "karras"),
        ("euler-ancestral", "", "euler-ancestral", ""),
        ("base", "", "base", ""),
    ],
)
def test_sampler_names_of_other_programs(
    sampler: str, schedule: str, scheduler: str, unsupported_schedule: str
) -> None:
    table, notes = convert({"Sampler": sampler, **({"Schedule type": schedule} if schedule else {})})
    assert table["scheduler"] == scheduler
    reason = "is not supported, so the sampler's default steps are used and the pixels differ."
    assert notes == ((f"Schedule: {unsupported_schedule}: {reason}",) if unsupported_schedule else ())


@pytest.mark.parametrize("sampler", ["DPM++ 2M SDE", "DPM++ SDE", "UniPC", "Restart", "Undefined"])
def test_an_unknown_sampler_is_noted(sampler: str) -> None:
    table, notes = convert({"Sampler": sampler})
    assert "scheduler" not in table
    assert notes == (
        f"Sampler: {sampler}: is not supported, so the scheduler of the base is used and the pixels differ.",
    )


def test_unsupported_settings_are_noted_once_per_kind() -> None:
    changes = {"Hires upscale": "2", "Hires steps": "10", "ADetailer model": "face.pt", "Clip skip": "2"}
    _, notes = convert({**changes, "Denoising strength": "0.4", "Tiling": "x" * 99, "Version": "v1.10.1"})
    assert notes == (
        "Hires upscale: 2, Hires steps: 10: hires fix is not supported, so the pixels may differ.",
        "ADetailer model: face.pt: ADetailer is not supported, so the pixels may differ.",
        "Clip skip: 2: CLIP skip is not supported, so the pixels may differ.",
        "Denoising strength: 0.4: the image starts from pure noise, so the pixels may differ.",
        f"Tiling: {'x' * 60}…: not supported, so the pixels may differ.",
    )
    assert convert({"Clip skip": "1"})[1] == ()


def test_noise_is_assumed_to_come_from_the_gpu_for_a1111_and_from_the_cpu_for_comfyui() -> None:
    without = {key: value for key, value in PLAIN.items() if key != "RNG"}
    note = "RNG: GPU: the initial noise is generated on the CPU here, so the pixels differ."
    assert convert_settings(Infotext(prompt="", settings=without), source="x")[1] == (note,)
    assert convert({"RNG": "NV"})[1] == (note.replace("GPU", "NV", 1),)
    assert convert_settings(Infotext(prompt="", settings={**without, "Sampler": "euler"}), source="x")[1] == ()


def test_missing_settings_take_the_default_and_are_noted() -> None:
    table, notes = convert_settings(Infotext(prompt="a cat", settings={"Steps": "9"}), source="x.png")
    assert table == {"prompt": "a cat", "negative_prompt": "", "num_inference_steps": 9}
    assert [note.split(":")[0] for note in notes] == ["Seed", "CFG scale", "Size", "Sampler"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Steps": "many"}, r"x\.png: 'Steps' is 'many': input should be a valid integer"),
        ({"Steps": "0"}, "'Steps' is '0': input should be greater than 0"),
        ({"Seed": "-1"}, "'Seed' is '-1': input should be greater than or equal to 0"),
        ({"CFG scale": "nan"}, "'CFG scale' is 'nan': input should be a finite number"),
        ({"Size": "513x512"}, "'Size' is '513x512': width input should be a multiple of 8"),
        ({"Size": "512x0"}, "'Size' is '512x0': height input should be greater than 0"),
        ({"Size": "512"}, "'Size' is '512': expected width and height such as 512x768"),
        ({"Seed": "9" * 5000}, f"'Seed' is '{'9' * 60}…': "),
        ({"Steps": "x", "Seed": "y"}, "'Seed' is 'y': .*; 'Steps' is 'x': "),
    ],
)
def test_invalid_values_raise_with_their_keys(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(changes)


def save_image(path: Path, **options: object) -> Path:
    Image.new("RGB", (8, 8)).save(path, **options)
    return path


def save_with_comment(path: Path, value: bytes) -> Path:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = value
    return save_image(path, exif=exif.tobytes())  # PIL ignores an Exif object that has no tag in its main directory


@pytest.mark.parametrize("prompt", ["a cat", "a café, 灯台 🐈"])
@pytest.mark.parametrize("kind", ["tEXt", "iTXt", "zTXt"])
def test_png_text_chunks_of_every_kind_are_read(tmp_path: Path, prompt: str, kind: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    text = assemble_infotext(prompt, "fog", PLAIN)
    if kind == "iTXt":
        chunks.add_itxt("parameters", text)
    else:
        chunks.add_text("parameters", text, zip=kind == "zTXt")
    assert read_infotext(save_image(tmp_path / "x.png", pnginfo=chunks)) == parse_infotext(text, source="x")


def test_a_text_chunk_after_the_pixels_is_read(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"tEXt", b"parameters\0" + assemble_infotext("a cat", "", PLAIN).encode(), after_idat=True)
    info = read_infotext(save_image(tmp_path / "x.png", pnginfo=chunks))
    assert info is not None
    assert info.prompt == "a cat"


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        (b"UNICODE\0", "utf-16-be"),
        (b"UNICODE\0", "utf-16-le"),
        (b"UNICODE\0", "utf-16"),
        (b"UNICODE\0", "utf-8"),
        (b"ASCII\0\0\0", "utf-8"),
        (b"ASCII\0\0\0", "latin-1"),
        (bytes(8), "utf-8"),
        (b"", "utf-8"),
    ],
)
def test_user_comments_in_every_encoding_are_read(tmp_path: Path, ending: str, head: bytes, encoding: str) -> None:
    text = assemble_infotext("a café" if encoding == "latin-1" else "a café, 灯台 🐈", "fog", PLAIN)
    path = save_with_comment(tmp_path / f"x.{ending}", head + text.encode(encoding) + bytes(3))
    assert read_infotext(path) == parse_infotext(text, source="x")


def test_images_of_this_project_are_read(tmp_path: Path) -> None:
    config = GenerateConfig(prompt="a cat, sitting", seed=3, width=8, height=8)
    recipe = Recipe(base="tiny-sd", base_hash="ab" * 32, settings=config)
    write_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe)
    info = read_infotext(tmp_path / "x.png")
    assert info is not None
    assert (info.prompt, info.settings["Seed"], info.model) == ("a cat, sitting", "3", "tiny-sd")


def test_images_without_infotext_return_none(tmp_path: Path) -> None:
    assert read_infotext(save_image(tmp_path / "x.png")) is None
    assert read_infotext(save_image(tmp_path / "x.jpg")) is None
    assert read_infotext(save_with_comment(tmp_path / "y.jpg", b"ASCII\0\0\0taken at the sea")) is None


def test_parameters_that_are_not_an_infotext_raise(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", '{"prompt": "a cat"}')
    with pytest.raises(ConfigError, match=r"x\.png: its infotext has no line of settings"):
        read_infotext(save_image(tmp_path / "x.png", pnginfo=chunks))


def test_files_that_are_not_images_raise(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.png: no such file; expected a PNG, JPEG or WebP"):
        read_infotext(tmp_path / "none.png")
    with pytest.raises(ConfigError, match="not a readable PNG, JPEG or WebP"):
        read_infotext(tmp_path)
    (tmp_path / "x.png").write_text("a cat")
    with pytest.raises(ConfigError, match=r"x\.png: not a readable PNG, JPEG or WebP"):
        read_infotext(tmp_path / "x.png")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["jpg", "webp", "png"]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1),
    st.integers(0, 400),
)
def test_damaged_images_are_read_or_raise_config_error(
    tmp_path: Path, ending: str, damage: list[tuple[int, int]], cut: int
) -> None:
    path = save_with_comment(
        tmp_path / f"x.{ending}", b"UNICODE\0" + assemble_infotext("a cat", "", PLAIN).encode("utf-16-be")
    )
    data = bytearray(path.read_bytes())
    for at, value in damage:
        data[at % len(data)] = value
    path.write_bytes(data[: len(data) - cut])
    try:
        read_infotext(path)
    except ConfigError as error:
        assert str(error).startswith(str(path))


@given(st.binary(max_size=80))
def test_any_bytes_decode_to_text(value: bytes) -> None:
    assert isinstance(decode_comment(value), str)
