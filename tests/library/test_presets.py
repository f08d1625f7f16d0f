"""Adapters found by path, name and hash for presets, recipes, tags and A1111 images."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.cli import main
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendPreset, BlendWeight, Composition, Region
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.safetensors import file_payload_hash
from lora_diffusion.library.recipe import INFOTEXT_KEY, Recipe, read_recipe
from lora_diffusion.models.load import Base
from tests.conftest import random_adapter

Capture = pytest.CaptureFixture[str]
FAST = ["--steps", "1", "--width", "32", "--height", "32"]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def library(sd: Base, tmp_path: Path) -> Path:
    """A library of two adapters, one of them in a subfolder."""
    folder = tmp_path / "library"
    save_adapter(random_adapter(sd, seed=1), folder / "one.safetensors")
    save_adapter(random_adapter(sd, seed=2), folder / "more" / "two.safetensors")
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys: Capture, *arguments: object) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err


def save_example_preset(sd: Base, library: Path, tmp_path: Path) -> Path:
    preset = tmp_path / "presets" / "mine.json"
    adapters = [
        "--adapter",
        f"{library / 'one.safetensors'}:0.5:lbw=INALL",
        "--adapter",
        f"{library / 'more/two.safetensors'}:-0.2",
    ]
    assert (
        run("preset", "save", preset, "--base", sd.folder, "--prompt", "a cat", *FAST, *adapters, "--mode", "switch")
        == 0
    )
    return preset


def test_a_saved_preset_reproduces_its_settings(sd: Base, library: Path, tmp_path: Path) -> None:
    preset = save_example_preset(sd, library, tmp_path)
    table = json.loads(preset.read_text())
    assert [entry["path"] for entry in table["adapters"]] == [
        "../library/one.safetensors",
        "../library/more/two.safetensors",
    ]
    assert all(len(entry["hash"]) == 64 for entry in table["adapters"])
    assert table["adapters"][0]["weight"]["blocks"]["OUT03"] == 0.0
    assert run("generate", "--preset", preset, "--output", tmp_path / "out") == 0
    recipe = read_recipe(tmp_path / "out" / "00000.png")
    assert (recipe.composition.mode, recipe.settings.prompt) == ("switch", "a cat")  # type: ignore[union-attr]
    assert run("preset", "save", tmp_path / "again.json", "--from", tmp_path / "out" / "00000.png") == 0
    first, again = (BlendPreset.from_json(p.read_text(), source="") for p in (preset, tmp_path / "again.json"))
    assert [(e.hash, e.weight) for e in first.adapters] == [(e.hash, e.weight) for e in again.adapters]
    assert first.composition == again.composition


def test_a_moved_and_renamed_file_is_found_by_its_hash(
    sd: Base, library: Path, tmp_path: Path, capsys: Capture
) -> None:
    preset = save_example_preset(sd, library, tmp_path)
    shutil.move(library / "one.safetensors", library / "more" / "renamed.safetensors")
    assert run("generate", "--preset", preset, "--library", library, "--output", tmp_path / "out") == 0
    assert "renamed.safetensors, which has the recorded hash" in capsys.readouterr().err
    assert run("preset", "check", preset, "--library", library) == 1
    assert "not found" in capsys.readouterr().out


def test_a_changed_file_is_reported_and_not_used(sd: Base, library: Path, tmp_path: Path, capsys: Capture) -> None:
    preset = save_example_preset(sd, library, tmp_path)
    save_adapter(random_adapter(sd, seed=7), library / "one.safetensors")
    message = refused(capsys, "generate", "--preset", preset, "--library", library, "--output", tmp_path / "out")
    assert "differs from the recorded hash" in message
    assert run("preset", "check", preset, "--library", library) == 1
    assert "FAILED  adapter random-1" in capsys.readouterr().out
    save_adapter(random_adapter(sd, seed=1), library / "backup.safetensors")
    assert run("generate", "--preset", preset, "--library", library, "--output", tmp_path / "out") == 0
    assert "has changed" in capsys.readouterr().err


def test_presets_are_listed_shown_and_checked(sd: Base, library: Path, tmp_path: Path, capsys: Capture) -> None:
    preset = save_example_preset(sd, library, tmp_path)
    (preset.parent / "broken.json").write_text("{")
    capsys.readouterr()
    assert run("preset", "list", preset.parent) == 0
    listed = capsys.readouterr().out
    assert "mine: random-1, random-2" in listed
    assert "broken.json" in listed
    assert run("preset", "show", preset) == 0
    assert "random-2:-0.2" in capsys.readouterr().out
    assert run("preset", "check", preset, "--json") == 0
    assert all(not check["problem"] for check in json.loads(capsys.readouterr().out))
    assert "already exists" in refused(
        capsys, "preset", "save", preset, "--adapter", library / "one.safetensors", "--base", sd.folder
    )
    assert "is a .json file" in refused(
        capsys, "preset", "save", tmp_path / "x", "--adapter", library / "one.safetensors"
    )
    assert "nothing to save" in refused(capsys, "preset", "save", tmp_path / "x.json")
    assert "no such folder" in refused(capsys, "preset", "list", tmp_path / "nowhere")


def test_tags_find_adapters_in_the_library(sd: Base, library: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ["--base", sd.folder, "--library", library, "--output", tmp_path / "out", *FAST]
    assert run("generate", *common, "--prompt", "a cat <lora:one:0.5:te=0> <lora:two:start=0.5>") == 0
    recipe = read_recipe(tmp_path / "out" / "00000.png")
    assert recipe.settings and recipe.settings.prompt == "a cat"
    assert [entry.name for entry in recipe.adapters] == ["random-1", "random-2"]
    assert isinstance(recipe.adapters[0].weight, BlendWeight)
    assert "did you mean 'one'" in refused(capsys, "generate", *common, "--prompt", "a cat <lora:onne:1>")
    assert not (tmp_path / "out" / "00001.png").exists()


def test_balanced_weights_are_recorded_in_the_recipe(sd: Base, library: Path, tmp_path: Path) -> None:
    common = ["--base", sd.folder, "--library", library, "--output", tmp_path / "out", *FAST, "--balance"]
    assert run("generate", *common, "--prompt", "a cat <lora:one:1> <lora:two:1>") == 0
    weights = [entry.weight for entry in read_recipe(tmp_path / "out" / "00000.png").adapters]
    assert all(isinstance(weight, float) for weight in weights)
    assert weights[0] != 1.0
    assert float(weights[0]) * float(weights[1]) == pytest.approx(1.0)  # type: ignore[arg-type]


def a1111_picture(path: Path, prompt: str, hashes: str = "") -> Path:
    texts = PngImagePlugin.PngInfo()
    line = f"Steps: 1, Sampler: DDIM, CFG scale: 4, Seed: 5, Size: 32x32, Model: v1-5{hashes}"
    texts.add_text(INFOTEXT_KEY, f"{prompt}\nNegative prompt: blurry\n{line}")
    Image.new("RGB", (8, 8)).save(path, pnginfo=texts)
    return path


def test_an_a1111_image_is_replayed_with_its_adapters(sd: Base, library: Path, tmp_path: Path, capsys: Capture) -> None:
    digest = file_payload_hash(library / "one.safetensors")[:12]
    picture = a1111_picture(
        tmp_path / "a.png", "a cat <lora:their_name:0.4:0.9>", f', Lora hashes: "their_name: {digest}"'
    )
    common = ["--library", library, "--output", tmp_path / "out"]
    assert "give the base with --base" in refused(capsys, "generate", "--from", picture, *common)
    assert run("generate", "--from", picture, "--base", sd.folder, *common) == 0
    recipe = read_recipe(tmp_path / "out" / "00000.png")
    weight = recipe.adapters[0].weight
    assert isinstance(weight, BlendWeight)
    assert (weight.value, weight.components["text_encoder"]) == (0.9, 0.4), (
        "A1111 writes the text encoder's weight first"
    )
    assert recipe.settings and (recipe.settings.seed, recipe.settings.negative_prompt) == (5, "blurry")
    lost = a1111_picture(tmp_path / "b.png", "a <lora:x:1>", ', Lora hashes: "x: 0123456789ab"')
    assert "hash 0123456789ab) is not in" in refused(capsys, "generate", "--from", lost, "--base", sd.folder, *common)


def test_differences_from_a1111_prompts_are_noted(sd: Base, library: Path, tmp_path: Path, capsys: Capture) -> None:
    picture = a1111_picture(tmp_path / "a.png", "a (red:1.4) cat AND dog", ', TI hashes: "EasyNegative: 0123456789ab"')
    common = ["--base", sd.folder, "--library", library, "--output", tmp_path / "out"]
    assert run("generate", "--from", picture, *common) == 0
    notes = capsys.readouterr().err
    assert "textual inversion embeddings (EasyNegative) are not searched for" in notes
    assert "words in brackets are interpolated with the empty prompt" in notes
    assert "AND is an ordinary word" in notes
    edited = a1111_picture(tmp_path / "b.png", "a [cat:dog:0.5]")
    assert "prompt editing" in refused(capsys, "generate", "--from", edited, *common)


def test_images_contain_a1111_lora_hashes(sd: Base, library: Path, tmp_path: Path) -> None:
    common = ["--base", sd.folder, "--output", tmp_path / "out", *FAST, "--prompt", "a cat"]
    assert run("generate", *common, "--adapter", library / "one.safetensors") == 0
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert f"random-1: {file_payload_hash(library / 'one.safetensors')[:12]}" in image.info[INFOTEXT_KEY]


def test_block_presets_are_read_from_a_file(tmp_path: Path, capsys: Capture) -> None:
    blocks = tmp_path / "lbwpresets.txt"
    blocks.write_text("# mine\nSOFT:" + ",".join(["0.5"] * 17) + "\n")
    common = ["--output", tmp_path / "out", "--steps", 1, "--block-presets", blocks]
    message = refused(capsys, "generate", *common, "--prompt", "a cat <lora:neon:1:lbw=SOFT>")
    assert "block vector of 17 values does not fit" in message
    assert "did you mean 'SOFT'" in refused(capsys, "generate", *common, "--prompt", "a cat <lora:neon:1:lbw=SOFFT>")


def test_presets_refer_to_masks_by_path_and_hash(sd: Base, library: Path, tmp_path: Path, capsys: Capture) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    unet = random_adapter(sd, seed=3, text_encoders=())
    save_adapter(unet, library / "three.safetensors")
    preset = tmp_path / "presets" / "masked.json"
    adapter = f"{library / 'three.safetensors'}:1:mask={tmp_path / 'mask.png'}:feather=0"
    assert run("preset", "save", preset, "--base", sd.folder, "--prompt", "a cat", *FAST, "--adapter", adapter) == 0
    region = BlendPreset.from_json(preset.read_text(), source="").adapters[0].region
    assert isinstance(region, Region)
    assert region.mask == "../mask.png"
    assert len(region.mask_hash) == 64
    assert run("generate", "--preset", preset, "--output", tmp_path / "out") == 0
    Image.new("L", (8, 8), 7).save(tmp_path / "mask.png")
    assert "not the mask" in refused(capsys, "generate", "--preset", preset, "--output", tmp_path / "out")


def test_the_sample_presets_pass_the_check() -> None:
    for path in sorted((sample_data_folder() / "presets").glob("*.json")):
        assert run("preset", "check", path) == 0


def test_keys_of_earlier_versions_are_read() -> None:
    settings = {"prompt": "a cat", "steps": 7, "guidance": 2.5}
    text = json.dumps({"name": "old", "adapters": [], "composition": {"exact": True}, "settings": settings})
    preset = BlendPreset.from_json(text, source="old.json")
    assert preset.settings == GenerateConfig(prompt="a cat", num_inference_steps=7, guidance_scale=2.5)
    assert preset.composition == Composition(parallel=True)
    recipe = Recipe.model_validate(
        {"kind": "image", "base": "tiny-sd", "base_hash": "", "codes": "nf4", "settings": {"prompt": ""}}
    )
    assert recipe.quantization == "nf4"
    assert AdapterMetadata.model_validate({"least_rank": 2}).min_rank == 2
    assert BlendPreset.from_json(preset.model_dump_json(), source="new.json") == preset
