"""The command that distills: flags, presets and prompts in, one file and how close it came out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.cli.commands.distill import Distill
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import GenerateConfig, LoadConfig
from lora_diffusion.config.preset import BlendEntry, BlendPreset
from lora_diffusion.errors import ConfigError, DatasetError, LoRADiffusionError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.models.load import Base
from lora_diffusion.training.distillation.distill import DistillResult
from lora_diffusion.workflows.images.request import GenerationRequest
from lora_diffusion.workflows.training.distill import PromptSource, distill_file, make_scene_prompts, read_prompts
from tests.conftest import random_adapter
from tests.helpers.blends import blend_of
from tests.training.distillation.test_distillation import PROMPTS, SWITCH, make_config, two


@pytest.fixture
def files(tmp_path: Path, sd: Base) -> Path:
    """Two adapters, prompts and a preset that switches between them."""
    for name, entry in zip(("one", "two"), two(sd).entries, strict=True):
        save_adapter(entry.adapter, tmp_path / f"{name}.safetensors")
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    preset = BlendPreset(
        name="both",
        base=str(sd.folder),
        adapters=(BlendEntry(path="one.safetensors", weight=0.8), BlendEntry(path="two.safetensors", weight=0.6)),
        composition=SWITCH,
        settings=GenerateConfig(prompt="unused", num_inference_steps=2, guidance_scale=1.0),
    )
    (tmp_path / "both.json").write_text(preset.model_dump_json())
    return tmp_path


def made(files: Path, output: str, config: DistillConfig) -> DistillResult:
    entries = tuple(BlendEntry(path=str(files / f"{name}.safetensors")) for name in ("one", "two"))
    base = json.loads((files / "both.json").read_text())["base"]
    plan = GenerationRequest(base=base, entries=entries, settings=GenerateConfig(prompt=""), composition=SWITCH)
    source = PromptSource(file=files / "prompts.txt")
    return distill_file(plan, source, config, files / output, LoadConfig(low_memory=True)).result


def test_one_seed_gives_one_file(files: Path, sd: Base) -> None:
    results = [made(files, f"{i}.safetensors", make_config(seed=seed, steps=1)) for i, seed in enumerate((3, 3, 4))]
    contents = [(files / f"{i}.safetensors").read_bytes() for i in range(3)]
    assert contents[0] == contents[1] != contents[2]
    assert results[0].adapter.hash != results[2].adapter.hash
    metadata = load_adapter(files / "0.safetensors").metadata
    assert metadata.merged_from == tuple(entry.hash for entry in two(sd).entries)
    assert metadata.trigger_words == ("sks",)
    prompts = {*metadata.training["learned_prompts"], *metadata.training["held_out_prompts"]}
    assert prompts == set(PROMPTS)
    assert (metadata.training["error"], metadata.training["composition"]["mode"]) == (results[0].report.error, "switch")


def command(*arguments: str) -> int:
    return tyro.cli(Distill, args=list(arguments)).run()


def test_the_command_prints_how_close_it_came(files: Path, sd: Base, capsys: pytest.CaptureFixture[str]) -> None:
    output = files / "new" / "one.safetensors"
    shared = ["--rank=2", "--steps=2", "--runs=1", "--resolution=16", f"--prompts={files / 'prompts.txt'}"]
    preset = ["--preset", str(files / "both.json"), "--output", str(output)]
    assert command(*preset, *shared, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert Path(facts["output"]) == output
    record = load_adapter(output).metadata.training
    assert (record["num_inference_steps"], record["guidance_scale"]) == (2, 1.0)
    assert record["composition"] == {"mode": "switch", "switch_every": 1}
    assert (facts["error"], facts["learned_from"], facts["measured_on"]) == (record["error"], 6, 2)
    adapters = [f"--adapter={files / name}.safetensors:{weight}" for name, weight in (("one", 0.8), ("two", 0.6))]
    modes = [f"--base={sd.folder}", "--mode=composite", "--num-inference-steps=2", f"--output={output}", "--force"]
    assert command(*adapters, *modes, *shared) == 0
    lines = capsys.readouterr().out.splitlines()
    record = load_adapter(output).metadata.training
    assert lines[0].startswith(f"{output}: distilled in ")
    kinds = ("plain_error", "start_error", "error")
    assert [line.split()[-1] for line in lines[2:]] == [f"{record[kind]:.4f}" for kind in kinds]


def test_without_prompts_scenes_with_all_trigger_words_are_used(sd: Base, tmp_path: Path) -> None:
    named = [
        replace(random_adapter(sd, seed=i), metadata=AdapterMetadata(trigger_words=words))
        for i, words in enumerate((("sks", "dog"), (), ("sks", "zwx")))
    ]
    prompts = make_scene_prompts(blend_of(*((adapter, 1.0) for adapter in named)))
    assert len(set(prompts)) == len(prompts) > 8
    assert all(prompt.endswith(", sks, dog, zwx") for prompt in prompts)
    (tmp_path / "p.txt").write_text("  a cat \n\na dog\n")
    assert read_prompts(tmp_path / "p.txt") == ("a cat", "a dog")


def test_bad_flags_are_one_clear_error_and_no_file(files: Path, sd: Base) -> None:
    one, output = files / "one.safetensors", files / "out" / "new.safetensors"
    (files / "empty.txt").write_text("\n")
    (files / "empty").mkdir()
    blend = ["--base", str(sd.folder), "--adapter", str(one)]
    new = [*blend, "--output", str(output)]
    bad: list[tuple[list[str], type[LoRADiffusionError], str]] = [
        ([*new, "--rank", "0"], ConfigError, "'rank' is '0': input should be greater than 0"),
        ([*new, "--switch-every", "2"], ConfigError, "switch_every is a setting of the mode switch"),
        ([*new, "--prompts", str(files / "none.txt")], ConfigError, "one prompt per line"),
        ([*new, "--prompts", str(files / "empty.txt")], ConfigError, "contains no prompts"),
        (
            [*new, "--prompts", str(files / "prompts.txt"), "--data", str(files)],
            ConfigError,
            "give one source of prompts",
        ),
        ([*new, "--data", str(files / "empty")], DatasetError, "no images found"),
        (["--output", str(output)], ConfigError, "give at least one adapter"),
        ([*blend, "--output", str(files / "two.safetensors")], OutputError, "already exists"),
        ([*blend, "--output", str(one), "--force"], OutputError, "is one of the inputs"),
        ([*blend, "--output", str(files / "new.pt")], OutputError, "ends in .safetensors"),
        ([*new[:2], "--adapter", f"{one}:box=0,0,0.5,1", *new[4:]], ConfigError, "leave the region out"),
    ]
    before = one.read_bytes()
    for arguments, kind, message in bad:
        with pytest.raises(kind, match=message):
            command(*arguments)
        assert not (files / "out").exists(), arguments
    assert one.read_bytes() == before
