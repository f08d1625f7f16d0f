"""Every public function of the workflows that takes a path accepts a string, a `Path` and any other `os.PathLike`."""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion import workflows
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.algebra.svd.rank_selection import RankRule
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import GenerateConfig, LoadConfig
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.config.train import DataConfig, TrainConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.library.references import AdapterResolver, ResolvedBlend
from lora_diffusion.models.load import Base
from lora_diffusion.training.log import LOG
from lora_diffusion.workflows import demo, merge
from lora_diffusion.workflows.adapters import analyze, combine, convert, extract, pack, prune, verify
from lora_diffusion.workflows.adapters import inspect as inspect_workflow
from lora_diffusion.workflows.images import generate, grid, presets, request
from lora_diffusion.workflows.images.grid_axes import GridAxis
from lora_diffusion.workflows.training import dataset_check, distill, report, run, sample_sheet
from tests.conftest import random_adapter

PICTURES = DataConfig(folder=sample_data_folder() / "subjects" / "gloop")


class PathLike:
    """A path that is neither a string nor a `Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


Spelling = Callable[[Path], Any]
Cases = dict[str, Callable[[Spelling, Path], object]]
"""The call of each function, by module and name, with the spelling of paths and an empty folder to write to."""


def public_functions() -> dict[str, Callable[..., Any]]:
    names = [module.name for module in pkgutil.walk_packages(workflows.__path__, f"{workflows.__name__}.")]
    return {
        f"{name.rpartition('.')[2]}.{function.__name__}": function
        for name in names
        for function in vars(importlib.import_module(name)).values()
        if inspect.isfunction(function) and function.__module__ == name and not function.__name__.startswith("_")
    }


@pytest.fixture
def inputs(sd: Base, tmp_path: Path) -> Path:
    """A folder with an adapter, a merged checkpoint, an image, a preset, a pack and a finished run."""
    adapter = random_adapter(sd, seed=1)
    save_adapter(adapter, tmp_path / "a.safetensors")
    blend = Blend(entries=(WeightedAdapter(adapter=adapter, path=tmp_path / "a.safetensors"),))
    settings = GenerateConfig(prompt="x", num_inference_steps=1, guidance_scale=1.0)
    made = request.GenerationRequest(
        base=str(sd.folder), entries=(BlendEntry(path=str(tmp_path / "a.safetensors")),), settings=settings
    )
    resolved, load = ResolvedBlend(blend=blend), LoadConfig()
    generate.write_images(sd, resolved, made, tmp_path, load, on_image=lambda _path, _picture: None)
    generate.save_request_as_preset(made, tmp_path / "p.json", load, name="", description="", force=False)
    merge.merge_files(merge.MergeRequest(base=made.base, entries=made.entries), tmp_path / "merged")
    pack.pack_files([tmp_path / "a.safetensors"], tmp_path / "pack.safetensors", pack.PackConfig(rank=2))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    write_run(tmp_path / "x-run")
    return tmp_path


def write_run(folder: Path) -> None:
    folder.mkdir()
    config = TrainConfig.model_validate({"data": {"folder": "pictures"}, "output": "x.safetensors"})
    texts = ("name", "finished", "base", "base_hash", "adapter", "adapter_hash", "buckets", "machine")
    numbers = ("steps_done", "seconds", "seconds_per_step", "memory_mb", "first_loss", "last_loss")
    counts = ("pictures", "held_out", "parameters")
    summary = {**dict.fromkeys(texts, "x"), **dict.fromkeys((*numbers, *counts), 1), "versions": {}}
    summary |= {"settings": config.model_dump(mode="json"), "allocation": {}}
    (folder / run.SUMMARY_FILE).write_text(json.dumps(summary))
    line = {"step": 1, "loss": 1.0, "seconds": 1.0, "gradient_norm": 1.0, "rate": 1.0}
    (folder / LOG).write_text(json.dumps(line) + "\n")


def adapter_cases(sd: Base, inputs: Path) -> Cases:
    a, merged, packed = inputs / "a.safetensors", inputs / "merged", inputs / "pack.safetensors"
    rule, out = RankRule(rank=2), "out.safetensors"
    return {
        "analyze.analyze_files": lambda p, _: analyze.analyze_files([p(a)], base=p(sd.folder)),
        "combine.combine_files": lambda p, to: combine.combine_files(
            [BlendEntry(path=str(a))], p(to / out), combine.CombineConfig()
        ),
        "convert.convert": lambda p, to: convert.convert(p(a), p(to / out), convert.ConvertConfig(to="kohya")),
        "convert.convert_files": lambda p, to: convert.convert_files([p(a)], p(to), convert.ConvertConfig(to="kohya")),
        "extract.extract_file": lambda p, to: extract.extract_file(
            p(merged), p(sd.folder), p(to / out), extract.ExtractConfig(rule=rule)
        ),
        "extract.approximate_file": lambda p, to: extract.approximate_file(
            p(sd.folder), p(to / out), extract.ExtractConfig(rule=rule)
        ),
        "inspect.inspect_adapter": lambda p, _: inspect_workflow.inspect_adapter(p(a)),
        "inspect.file_hashes": lambda p, _: inspect_workflow.file_hashes(p(a)),
        "pack.pack_files": lambda p, to: pack.pack_files([p(a)], p(to / out), pack.PackConfig(rank=2)),
        "pack.unpack_file": lambda p, to: pack.unpack_file(p(packed), p(to)),
        "prune.prune_file": lambda p, to: prune.prune_file(p(a), p(to / out), prune.PruneConfig(keep=0.5)),
        "verify.verify": lambda p, _: verify.verify(p(a), base=p(sd.folder)),
    }


def image_cases(sd: Base, inputs: Path) -> Cases:
    image, preset, axis = inputs / "00000.png", inputs / "p.json", GridAxis()
    load, resolver = LoadConfig(), AdapterResolver()
    made = request.request_from_image(image, base=str(sd.folder), resolver=resolver)
    bare = request.GenerationRequest(base=made.base, entries=(), settings=made.settings)
    nothing = ResolvedBlend(blend=Blend())
    changes: dict[str, Any] = {"base": "", "settings": {}, "composition": {}, "adapters": ()}
    texts: dict[str, Any] = {"name": "", "description": "", "force": False}
    return {
        "generate.generate_files": lambda p, to: generate.generate_files(bare, p(to)),
        "generate.write_images": lambda p, to: generate.write_images(
            sd, nothing, bare, p(to), load, on_image=lambda _path, _picture: None
        ),
        "generate.next_image_path": lambda p, _: generate.next_image_path(p(inputs)),
        "generate.save_request_as_preset": lambda p, to: generate.save_request_as_preset(
            made, p(to / "q.json"), load, **texts
        ),
        "grid.draw_grid": lambda p, to: grid.draw_grid(bare, axis, axis, p(to)),
        "grid.save_sheet": lambda p, to: grid.save_sheet([[p(image)]], axis, axis, p(to)),
        "grid.measure_blocks": lambda p, to: refused(
            ConfigError, "the blend has no adapters", lambda: grid.measure_blocks(bare, "", p(to))
        ),
        "grid.rank_blocks": lambda p, _: grid.rank_blocks({"": p(image), "IN01": p(image)}),
        "presets.check_preset": lambda p, _: presets.check_preset(p(preset), resolver),
        "request.request_from_preset": lambda p, _: request.request_from_preset(p(preset), **changes),
        "request.request_from_image": lambda p, _: request.request_from_image(p(image), base="", resolver=resolver),
        "request.request_from_settings": lambda p, _: request.request_from_settings(
            p(image), resolver=resolver, **changes
        ),
    }


def other_cases(sd: Base, inputs: Path) -> Cases:
    merged, folder = inputs / "merged", inputs / "x-run"
    task = merge.MergeRequest(base=str(sd.folder), entries=(BlendEntry(path=str(inputs / "a.safetensors")),))
    settings = request.GenerationRequest(base="tiny-sd", entries=(), settings=GenerateConfig(prompt=""))
    checked = dataset_check.check_dataset_for_base(PICTURES, "tiny-sd")
    summary, log = json.loads((folder / run.SUMMARY_FILE).read_text()), [json.loads((folder / LOG).read_text())]
    return {
        "demo.run_demo": lambda p, _: refused(
            OutputError, "files that no demo wrote", lambda: demo.run_demo(p(inputs), steps=1, print_line=print)
        ),
        "merge.read_preset_entries": lambda p, _: merge.read_preset_entries(p(inputs / "p.json")),
        "merge.request_from_checkpoint": lambda p, _: merge.request_from_checkpoint(p(merged), base="", force=False),
        "merge.merge_files": lambda p, to: merge.merge_files(task, p(to / "again")),
        "merge.undo_files": lambda p, to: merge.undo_files(p(merged), p(to / "undone")),
        "dataset_check.save_contact_sheet": lambda p, to: dataset_check.save_contact_sheet(
            checked, PICTURES, p(to / "sheet.png")
        ),
        "distill.distill_file": lambda p, to: refused(
            OutputError,
            r"ends in \.safetensors",
            lambda: distill.distill_file(
                settings, distill.PromptSource(), DistillConfig(), p(to / "x.txt"), LoadConfig()
            ),
        ),
        "distill.read_prompts": lambda p, _: distill.read_prompts(p(inputs / "prompts.txt")),
        "report.render_report": lambda p, _: report.render_report(p(folder), summary, log),
        "run.write_report": lambda p, _: run.write_report(p(folder)),
        "sample_sheet.sheet_path": lambda p, _: sample_sheet.sheet_path(p(folder)),
        "sample_sheet.draw_sheet": lambda p, _: sample_sheet.draw_sheet(p(folder), ["a cat"]),
    }


def refused(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("spelling", [str, Path, PathLike])
def test_paths_of_every_kind_are_accepted(spelling: Spelling, sd: Base, inputs: Path) -> None:
    cases = {**adapter_cases(sd, inputs), **image_cases(sd, inputs), **other_cases(sd, inputs)}
    for number, (name, call) in enumerate(cases.items()):
        call(spelling, inputs / f"found-{number}")
        call(Path, inputs / f"expected-{number}")
        assert list_files(inputs / f"found-{number}") == list_files(inputs / f"expected-{number}"), name


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_every_public_function_with_a_path_is_tested(sd: Base, inputs: Path) -> None:
    annotations = {
        name: [str(parameter.annotation) for parameter in inspect.signature(function).parameters.values()]
        for name, function in public_functions().items()
    }
    only_path = [name for name, kinds in annotations.items() if any(k in ("Path", str(Path)) for k in kinds)]
    assert only_path == []
    takes_path = {name for name, kinds in annotations.items() if any("PathLike" in kind for kind in kinds)}
    assert takes_path == {*adapter_cases(sd, inputs), *image_cases(sd, inputs), *other_cases(sd, inputs)}
