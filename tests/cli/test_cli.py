"""The commands as a user types them: results, replays, and one clear sentence for bad input."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.cli import main
from lora_diffusion.cli.blend_flags import parse_adapter
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.library.recipe import INFOTEXT_KEY, library_versions, read_recipe, write_png
from lora_diffusion.models.load import Base
from tests.conftest import random_adapter


@pytest.fixture
def adapter(sd: Base, tmp_path: Path) -> Path:
    path = tmp_path / "one.safetensors"
    save_adapter(random_adapter(sd, seed=1), path)
    return path


def generate(sd: Base, output: Path, *arguments: str) -> int:
    common = ["generate", "--base", str(sd.folder), "--output", str(output), "--steps", "2"]
    return main([*common, "--prompt", "a cat", *arguments])


def open_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on standard error, after exit code 2 and nothing on standard output."""
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    return printed.err


def test_generate_writes_pictures_that_replay_to_the_same_pixels(
    sd: Base, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(sd, tmp_path / "a", "--adapter", f"{adapter}:0.7", "--count", "2", "--seed", "5", "--json") == 0
    first, second = (Path(p) for p in json.loads(capsys.readouterr().out))
    assert (first.name, second.name) == ("00000.png", "00001.png")
    assert main(["generate", "--from", str(second), "--output", str(tmp_path / "b")]) == 0
    assert open_image(tmp_path / "b" / "00000.png").tobytes() == open_image(second).tobytes()
    recipe = read_recipe(second)
    assert recipe.settings is not None
    assert (recipe.settings.seed, recipe.adapters[0].weight) == (6, 0.7)
    assert recipe == read_recipe(tmp_path / "b" / "00000.png")


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"device": "cuda"}, ["made on cuda, replayed on cpu; the pixels may differ"]),
        *(
            ({"versions": {name: "0.0.1"}}, [f"made with {name} 0.0.1, replayed with {own}; the pixels may differ"])
            for name, own in library_versions().items()
        ),
        (
            {"device": "cuda", "versions": {"torch": "0.0.1"}},
            [
                "made on cuda, replayed on cpu; the pixels may differ",
                f"made with torch 0.0.1, replayed with {library_versions()['torch']}; the pixels may differ",
            ],
        ),
    ],
    ids=["unchanged", "device", *library_versions(), "device and torch"],
)
def test_a_replay_warns_of_another_device_or_other_library_versions(
    sd: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], warnings: list[str]
) -> None:
    generate(sd, tmp_path)
    recipe = read_recipe(tmp_path / "00000.png")
    foreign = tmp_path / "foreign.png"
    write_png(open_image(tmp_path / "00000.png"), foreign, recipe.model_copy(update=changes))
    capsys.readouterr()
    assert main(["generate", "--from", str(foreign), "--output", str(tmp_path / "again")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {warning}" for warning in warnings]


def test_the_picture_carries_text_that_other_programs_read(sd: Base, adapter: Path, tmp_path: Path) -> None:
    generate(sd, tmp_path, "--adapter", str(adapter), "--negative-prompt", "rain")
    lines = open_image(tmp_path / "00000.png").info[INFOTEXT_KEY].splitlines()
    assert lines[0] == "a cat <lora:random-1:1>"
    assert lines[1] == "Negative prompt: rain"
    assert lines[2].startswith("Steps: 2, Sampler: base, CFG scale: 4, Seed: 0, Size: 32x32, Model hash: ")


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler-ancestral", "dpm++"])
def test_every_scheduler_makes_a_picture(sd: Base, tmp_path: Path, scheduler: str) -> None:
    assert generate(sd, tmp_path, "--scheduler", scheduler, "--width", "40", "--height", "24") == 0
    assert open_image(tmp_path / "00000.png").size == (40, 24)


def test_a_recipe_whose_adapter_has_changed_is_refused(
    sd: Base, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(sd, tmp_path / "a", "--adapter", str(adapter))
    capsys.readouterr()
    save_adapter(random_adapter(sd, seed=9), adapter)
    assert "differs from the recorded hash" in refused(
        capsys, "generate", "--from", str(tmp_path / "a" / "00000.png"), "--output", str(tmp_path / "b")
    )


def test_merge_and_inspect_report_as_json(
    sd: Base, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge", "--base", str(sd.folder), "--adapter", f"{adapter}:0.5", "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged_modules"] > 0
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["ranks"], facts["trigger_words"]) == (
        "tiny SD",
        {"min": 4, "median": 4, "max": 4},
        ["sks"],
    )
    assert sum(facts["components"].values()) == sum(facts["blocks"].values()) > 0
    assert main(["inspect", str(adapter)]) == 0
    assert "tiny SD" in capsys.readouterr().out


def test_a_weight_may_follow_a_path_that_has_colons_of_its_own(tmp_path: Path) -> None:
    odd = tmp_path / "a:0.5"
    odd.write_bytes(b"")
    assert parse_adapter(str(odd)).weight == 1.0
    assert parse_adapter(f"{odd}:-0.25").weight == -0.25
    assert parse_adapter("plain.safetensors").weight == 1.0
    with pytest.raises(ConfigError, match="'strong' is not a finite number"):
        parse_adapter("plain.safetensors:strong")


def test_bad_input_ends_in_one_sentence(
    sd: Base, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = ["--base", str(sd.folder)], ["--output", str(tmp_path / "out")]
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    blocked = tmp_path / "file"
    blocked.write_text("")
    toml = tmp_path / "run.toml"
    toml.write_text('data = "pictures"\noutput = "x.safetensors"\nrnak = 4\nsteps = 0\n')
    cases = [
        (["generate", *base, *out, "--prompt", "a", "--adapter", str(text)], "not a safetensors file"),
        (["generate", *base, *out, "--prompt", "a", "--adapter", "nowhere.safetensors"], "no such file"),
        (["generate", *base, *out, "--prompt", "a", "--adapter", f"{adapter}:much"], "is not a finite number"),
        (["generate", *base, *out, "--prompt", "a", "--adapter", f"{adapter}:nan"], "finite"),
        (["generate", *base, *out], "'prompt' is missing"),
        (["generate", *base, *out, "--prompt", "a", "--steps", "0"], "'num_inference_steps' is '0'"),
        (["generate", *base, *out, "--prompt", "a", "--width", "33"], "multiple of 8"),
        (["generate", "--base", str(tmp_path), *out, "--prompt", "a"], "no model_index.json"),
        (["generate", "--base", "no/such base", *out, "--prompt", "a"], "no such folder"),
        (["generate", *base, "--output", str(blocked / "x"), "--prompt", "a"], "cannot be written"),
        (["generate", "--from", str(blocked), *out], "not a readable PNG"),
        (["generate", *base, *out, "--preset", str(blocked)], "invalid JSON"),
        (["merge", *base, *out], "nothing to merge"),
        (["merge", *base, "--output", str(blocked), "--adapter", str(adapter)], "not an empty folder"),
        (["inspect", str(text)], "not a safetensors file"),
        (["train", str(toml)], "unknown key 'rnak'; did you mean 'adapter.rank'?"),
        (["train", str(toml)], "'steps' is 0: input should be greater than 0"),
        (["train", str(tmp_path / "none.toml")], "no such file"),
    ]
    for arguments, words in cases:
        assert words in refused(capsys, *arguments), arguments
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_is_not_stable_diffusion_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "is a FluxPipeline; expected StableDiffusionPipeline" in refused(
        capsys, "generate", "--base", str(tmp_path), "--prompt", "a", "--output", str(tmp_path / "out")
    )


def test_help_and_inspect_come_without_any_heavy_library() -> None:
    file = sample_data_folder() / "adapters" / "gloop.safetensors"
    code = (
        "import sys; from lora_diffusion.cli import main\n"
        f"main(['inspect', {str(file)!r}])\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'peft', 'gradio', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--adapter" in done.stdout
    assert "gloop" in done.stdout


def test_help_costs_little_more_than_the_libraries_it_is_made_with() -> None:
    """Half a second on an idle core; a ratio within one run holds on a busy one too."""
    help_command = [sys.executable, "-m", "lora_diffusion.cli", "--help"]
    libraries = [sys.executable, "-c", "import pydantic, tyro"]
    ours, theirs = [], []
    for _ in range(5):
        ours.append(processor_seconds(help_command))
        theirs.append(processor_seconds(libraries))
    assert min(ours) < 4 * min(theirs)


def processor_seconds(command: list[str]) -> float:
    before = children_seconds()
    subprocess.run(command, capture_output=True, check=True)
    return children_seconds() - before


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", ["library", "inspect"], ids=["long", "short"])
def test_a_reader_that_has_enough_is_no_mistake(command: str, tmp_path: Path) -> None:
    """As `lora-diffusion library | head -1`; a long text is written while the command runs, a short one at its end."""
    adapters = sample_data_folder() / "adapters"
    for number in range(5):
        shutil.copytree(adapters, tmp_path / str(number))
    arguments = {"library": [str(tmp_path), "--json"], "inspect": [str(adapters / "gloop.safetensors")]}[command]
    with subprocess.Popen(
        [sys.executable, "-m", "lora_diffusion.cli", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_grid_with_a_cell_that_cannot_be_made_makes_none(sd: Base, adapter: Path, tmp_path: Path) -> None:
    asked = ["grid", "--base", str(sd.folder), "--adapter", str(adapter), "--steps", "1", "--prompt", "a boat"]
    assert main([*asked, "--across", "mode=sum,np-lora", "--output", str(tmp_path / "grid")]) == 2
    assert not [*tmp_path.glob("grid/**/*.png")]
