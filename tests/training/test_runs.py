"""Whole training runs: style and DreamBooth commands, several processes, sample images, the report and dry runs."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from lora_diffusion.adapters.adapter import Adapter, adapter_hash
from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.cli import main
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.config.defaults import default_settings
from lora_diffusion.config.methods import METHODS
from lora_diffusion.config.settings import deep_merge, read_toml
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.models.load import load_base
from lora_diffusion.training.default_settings import make_settings
from lora_diffusion.training.train import train
from lora_diffusion.workflows.training.dry_run import estimate_run
from lora_diffusion.workflows.training.run import train_and_report
from tests.helpers.forked_processes import run_distributed, start_forked
from tests.helpers.short_runs import settings
from train_scripts.write_configs import CONFIGS, configs

METHOD_SETTINGS = {method.name: method.settings for method in METHODS}
QUICK = ["--set", "steps=2", "--set", "batch_size=1"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("purpose", ["style", "dreambooth"])
def test_the_defaults_of_every_family_are_valid(purpose: Any, family: str) -> None:
    table = default_settings(purpose, family)
    TrainConfig.model_validate({**table, "data": "x", "output": "y.safetensors"})
    assert table["steps"] > 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_example_configs_match_the_defaults(path: Path) -> None:
    assert path.read_text() == dict(configs())[path.name]
    config = read_toml(path, TrainConfig)
    assert config.batch_size * config.gradient_accumulation == 4
    assert config.data.folder == CONFIGS / "pictures"


def test_every_example_config_exists() -> None:
    assert sorted(dict(configs())) == sorted(path.name for path in CONFIGS.glob("*"))


def test_style_and_dreambooth_run_without_a_settings_file(
    pictures: Path,
    sd_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["--base", str(sd_folder)]
    style, subject = pictures.parent / "style.safetensors", pictures.parent / "subject.safetensors"
    command = ["train", "style", str(pictures), "--output", str(style), "--trigger", "sks"]
    assert main([*command, *base, *QUICK, "--gpu-gb", "8"]) == 0
    assert "style.safetensors: loss" in capsys.readouterr().out
    metadata = load_adapter(style).metadata
    assert metadata.trigger_words == ("sks",)
    assert metadata.training["compute"]["gradient_checkpointing"] is (metadata.family == "sd1")
    for path in pictures.glob("*.txt"):
        path.unlink()
    command = ["train", "dreambooth", str(pictures), "--output", str(subject), *base, *QUICK]
    assert main([*command, "--instance", "photo of sks dog", "--class-prompt", "photo of a dog", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    record = load_adapter(subject).metadata.training
    assert record["prior"] == {**record["prior"], "mode": "prediction", "prompt": "photo of a dog"}
    assert record["data"]["instance_prompt"] == "photo of sks dog"
    assert main([*command, "--instance", " "]) == 2
    assert "the instance prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t-lora", "b-lora", "slider"])
def test_methods_without_a_text_encoder_need_no_text_encoder_learning_rate(name: str) -> None:
    """The default learning rate of text encoders is dropped if no text encoder is trained."""
    if name == "b-lora":
        changes: dict[str, Any] = {
            "adapter": {"unet_target_modules": ["up_blocks.0.*"], "text_encoder_target_modules": []}
        }
    else:
        changes = {section: dict(values) for section, values in METHOD_SETTINGS[name].items()}
    files = {"data": {"folder": "x"}, "output": "x.safetensors"}
    assert make_settings("style", files, changes, base="tiny-sd").optimizer.text_encoder_learning_rate is None
    explicit = {**changes, "optimizer": {"text_encoder_learning_rate": 1e-4}}
    assert make_settings("style", files, explicit, base="tiny-sd").optimizer.text_encoder_learning_rate == 1e-4
    assert make_settings("style", files, base="tiny-sd").optimizer.text_encoder_learning_rate


def test_defaults_that_conflict_with_given_settings_are_dropped() -> None:
    """Learning rates for Prodigy, adapter settings when continuing from a file, and prior preservation for sliders."""
    files: dict[str, Any] = {"data": {"folder": "x", "instance_prompt": "a gloop"}, "output": "x.safetensors"}
    optimizer = make_settings("style", files, {"optimizer": {"kind": "prodigy"}}, base="tiny-sd").optimizer
    assert (optimizer.learning_rate, optimizer.text_encoder_learning_rate) == (1.0, None)
    adapter = make_settings("style", files, {"adapter": {"init_from": "a.safetensors"}}, base="tiny-sd").adapter
    assert (adapter.rank, adapter.unet_target_modules) == (AdapterConfig().rank, AdapterConfig().unet_target_modules)
    with pytest.raises(ConfigError, match="takes rank from the file; leave it out"):
        make_settings("style", files, {"adapter": {"init_from": "a.safetensors", "rank": 2}}, base="tiny-sd")
    slider = make_settings("dreambooth", files, {**METHOD_SETTINGS["slider"]}, base="tiny-sd")
    assert slider.prior.mode == "none"
    assert make_settings("dreambooth", files, base="tiny-sd").prior.mode == "prediction"


def test_base_adapters_are_resolved_relative_to_the_settings_file(tmp_path: Path) -> None:
    text = 'output = "x.safetensors"\ndata = "x"\nbase_adapters = { "one.safetensors" = 0.5 }\n'
    (tmp_path / "run.toml").write_text(text)
    assert read_toml(tmp_path / "run.toml", TrainConfig).base_adapters == {tmp_path / "one.safetensors": 0.5}


class Page(HTMLParser):
    """Parser that collects the links and scripts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.scripts += tag == "script"


def test_a_run_saves_samples_and_a_self_contained_report(
    pictures: Path,
    sd_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = "<script>alert(1)</script> & a cat"
    changes = {
        "samples": {"prompts": [hostile, "a dog"], "every": 2, "num_inference_steps": 1, "guidance_scale": 1.0},
        "validation": {"share": 0.25, "every": 2, "draws": 2, "base_prompts": ["a dog"]},
    }
    result = train_and_report(settings(pictures, sd_folder, changes, steps=4, name=hostile))
    folder = result.path.parent / "style-run"
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        f"step-{step:08d}-{number}.png" for step in (0, 2, 4) for number in (0, 1)
    ]
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.scripts == 0
    assert len(page.sources) == 2
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data)[1:4] == b"PNG"
    assert not re.search(r"https?://", text)
    assert f"<td>data.folder</td><td>{pictures}</td>" in text
    assert "<td>validation.every</td><td>2</td>" in text
    assert "<td>validation.patience</td>" not in text
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == text
    assert main(["report", str(pictures)]) == 2
    assert "give the NAME-run folder" in capsys.readouterr().err


def test_samples_do_not_change_the_run(pictures: Path, sd_folder: Path) -> None:
    plain = train(settings(pictures, sd_folder))
    shown = train(
        settings(pictures, sd_folder, {"samples": {"prompts": ["a cat"], "every": 1, "num_inference_steps": 1}})
    )
    assert adapter_hash(plain.adapter) == adapter_hash(shown.adapter)


def run_in_two_processes(config: TrainConfig, folder: Path, *, stop_rank: int | None = None) -> list[Any]:
    """Train in two processes; return for each `[is_main_process, steps]` and, at the start, its share of the UNet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [folder / f"rank-{rank}.json" for rank in (0, 1)]
    processes = [start_forked(run_distributed, config, rank, port, stop_rank, file) for rank, file in enumerate(files)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_train_the_same_as_one(pictures: Path, sd_folder: Path) -> None:
    """With the same global batch, the results differ only by the order in which gradients are summed.

    The run is stopped once in between, by a signal to one of the processes, and resumed.
    """
    top = {"save_precision": "float32", "steps": 3}
    changes = {"validation": {"share": 0.25, "every": 2, "draws": 2}, "samples": {"every": 2}}
    alone = train(settings(pictures, sd_folder, changes, batch_size=2, **top)).adapter
    output = pictures.parent / "two" / "style.safetensors"
    config = settings(pictures, sd_folder, changes, batch_size=1, output=output, **top)
    stopped = run_in_two_processes(config, pictures.parent, stop_rank=1)
    assert [each[:2] for each in stopped] == [[True, 2], [False, 2]]
    assert not output.exists()
    resumed = run_in_two_processes(config, pictures.parent)
    assert [each[:2] for each in resumed] == [[True, 3], [False, 3]]
    check_close(load_adapter(output), alone)


def check_close(actual: Adapter, expected: Adapter) -> None:
    for path, layer in expected.layers.items():
        for name, factor in layer.factors.items():
            assert (actual.layers[path].factors[name] - factor).norm() <= 1e-3 * factor.norm(), (path, name)


def test_a_sharded_base_trains_the_same(pictures: Path, sd_folder: Path) -> None:
    """Each process holds half of the UNet; samples, validation and adapter equal those of an unsharded base."""
    top = {"save_precision": "float32", "steps": 2}
    changes = {
        "validation": {"share": 0.25, "every": 2, "draws": 2, "base_prompts": ["a dog"]},
        "samples": {"prompts": ["a cat"], "num_inference_steps": 1, "every": 2},
        "compute": {"gradient_checkpointing": True},
    }
    alone = train(settings(pictures, sd_folder, changes, batch_size=2, **top))
    output = pictures.parent / "shared" / "style.safetensors"
    config = settings(
        pictures, sd_folder, deep_merge(changes, {"compute": {"shard": True}}), batch_size=1, output=output, **top
    )
    size = sum(p.numel() for p in load_base(str(sd_folder)).pipe.unet.parameters())
    ends = run_in_two_processes(config, pictures.parent)
    assert [each[:2] for each in ends] == [[True, 2], [False, 2]]
    sizes = [each[2] for each in ends]
    assert sum(sizes) >= size
    assert max(sizes) < 0.6 * size  # uneven rows are padded
    check_close(load_adapter(output), alone.adapter)
    samples = sorted((output.parent / "style-run" / "samples").iterdir())
    for path in samples:
        with Image.open(path) as ours, Image.open(alone.path.parent / "style-run" / "samples" / path.name) as theirs:
            assert ImageChops.difference(ours, theirs).getextrema() <= ((0, 2),) * 3
    assert len(samples) == 2


def test_sharding_needs_several_processes(pictures: Path, sd_folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is one; start the run with accelerate launch"):
        train(settings(pictures, sd_folder, {"compute": {"shard": True}}))


def test_a_dry_run_reports_requirements_and_leaves_no_files(
    pictures: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = pictures.parent / "out" / "style.safetensors"
    command = ["train", "style", str(pictures), "--output", str(output), "--base", str(sd_folder), "--dry-run"]
    sets = [
        "steps=50",
        "batch_size=2",
        "gradient_accumulation=1",
        "prior.mode=pictures",
        "prior.prompt=a dog",
        "prior.num_inference_steps=1",
        "prior.count=9",
    ]
    before = sorted(pictures.parent.rglob("*"))
    assert main([*command, "--json", *(part for each in sets for part in ("--set", each))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(path for path in pictures.parent.rglob("*") if path != output.parent) == before
    count = len(list(pictures.glob("*.png")))
    assert found["dataset"]["images"] == count
    assert found["pictures_per_step"] == 2
    assert found["passes"] == pytest.approx(50 * found["pictures_per_step"] / count)
    assert found["class_pictures"] == 9
    assert found["seconds"] > 50 * found["seconds_per_step"] > 0
    assert found["memory_mb"] > found["adapter_mb"] > 0
    assert main([*command, *QUICK]) == 0
    text = capsys.readouterr().out
    assert "2 steps of 1 picture, or 0.5 passes over the data" in text
    assert "leave out --dry-run" in text
    (pictures / "0.png").write_bytes(b"no picture")
    assert main(command) == 2
    assert "0.png" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_dry_run_predicts_the_size_of_the_adapter(pictures: Path, sd_folder: Path, precision: str) -> None:
    config = settings(pictures, sd_folder, save_precision=precision)
    needs = estimate_run(config)
    result = train(config)
    assert needs.adapter_mb * 1e6 == pytest.approx(result.path.stat().st_size, rel=0.02)
    assert needs.modules == len(result.adapter.layers)
    assert needs.parameters == sum(
        factor.numel() for layer in result.adapter.layers.values() for factor in layer.factors.values()
    )


def test_training_and_sampling_need_no_peft(pictures: Path, sd_folder: Path) -> None:
    """PEFT is a dependency of the tests alone; `None` in `sys.modules` makes its import fail."""
    (pictures.parent / "run.json").write_text(settings(pictures, sd_folder, steps=1).model_dump_json())
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from pathlib import Path\n"
        "from lora_diffusion import Blend, GenerateConfig, TrainConfig, generate, load_base, train\n"
        "result = train(TrainConfig.model_validate_json(Path('run.json').read_text()))\n"
        f"base = load_base({str(sd_folder)!r})\n"
        "settings = GenerateConfig(prompt='sks', num_inference_steps=1, width=16, height=16)\n"
        "print(len(generate(base, [settings], Blend.of({result.path: 0.5}))), 'image')\n"
    )
    path = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=pictures.parent,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.stdout.endswith("1 image\n"), done.stderr[-2000:]
