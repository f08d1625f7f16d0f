"""The blend on the table as a checkpoint of its own, or as one adapter."""

import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import get_args

from lora_diffusion.config.combine import CombineConfig, RankRule
from lora_diffusion.config.merge import MergeConfig, WeightType
from lora_diffusion.config.settings import validate
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.checkpoint import StoredTensor
from lora_diffusion.merging.merge import estimate_rounding
from lora_diffusion.models.locate import find_matching_checkpoint
from lora_diffusion.workflows.adapters.combine import combine_files
from lora_diffusion.workflows.images.generate import LoadOptions, load_and_resolve_blend
from lora_diffusion.workflows.images.request import GenerationRequest
from lora_diffusion.workflows.merge import MergeRequest, merge_files
from lora_diffusion_studio.forms import BlendForm, adapter_flags
from lora_diffusion_studio.rendering import EventStream, Halted, Waiting
from lora_diffusion_studio.studio import Studio, check_name

PRECISIONS = get_args(WeightType)
PROBE_BYTES = 2**25
TOLD = 50
"""So often at most a visitor is told how far a merge is."""
COPIES = 2.0
"""A merge takes about so long as copying the files, by tests/benchmarks/merging.py."""


@dataclass(frozen=True, kw_only=True)
class MergeTarget:
    """What to write."""

    name: str
    kind: str = "folder"
    """`folder`, `file` or `adapter`."""
    precision: str = "keep"
    rank: int = 0
    """Of one adapter; 0 keeps it exact."""

    @property
    def file(self) -> str:
        """The name in the studio's folder. Raises ConfigError for one that cannot be."""
        return check_name(self.name) + ("" if self.kind == "folder" else ".safetensors")


@dataclass(frozen=True)
class WriteProgress:
    """The share of the output that is written."""

    share: float = 0.0

    @property
    def text(self) -> str:
        return f"writing, {self.share:.0%} done"


@dataclass(frozen=True, kw_only=True)
class MergeDone:
    """The written output, and its losses."""

    path: Path
    text: str


def resolve_output(studio: Studio, target: MergeTarget) -> Path:
    """Return the output path. Raises ConfigError for a name that is taken."""
    path = studio.places.output / ("adapters" if target.kind == "adapter" else "merged") / target.file
    if path.exists():
        raise ConfigError(f"{target.name}: is there already; give another name")
    return path


def make_merge_request(studio: Studio, form: BlendForm) -> GenerationRequest:
    """Return the form as a merge request. Raises ConfigError for what weights cannot hold."""
    if not any(row.on for row in form.rows):
        raise ConfigError("no adapter is on the table; put one there")
    if form.mode != "sum":
        raise ConfigError(f"the mode {form.mode} cannot be held by weights; choose Sum")
    return studio.make_request(BlendForm(base=form.base, rows=form.rows, settings={"prompt": "merge"}))


def summarize_merge(studio: Studio, form: BlendForm, target: MergeTarget) -> str:
    """Describe what merging would do, without doing it. Raises LoRADiffusionError's children."""
    request, path = make_merge_request(studio, form), resolve_output(studio, target)
    blend = load_and_resolve_blend(request.base, request.entries, LoadOptions(resolver=studio.resolver)).blend
    modules = len({module for entry in blend.active for module in entry.adapter.layers})
    names = ", ".join(f"{row.name.removesuffix('.safetensors')} at {row.weight:g}" for row in form.rows if row.on)
    if target.kind == "adapter":
        ranks = "the exact sum, whose ranks add up" if not target.rank else f"the closest of rank {target.rank}"
        return f"{names}: one adapter of {modules} modules, {ranks}, in {path.name}"
    checkpoint = find_matching_checkpoint(request.base, blend)
    config = validate(MergeConfig, {"precision": target.precision}, source="merge")
    size = sum(count_bytes(stored, target.precision) for stored in checkpoint.parameters.values())
    seconds = COPIES * size / measure_write_rate(studio.places.output)
    duration = f"about {seconds:.0f} s" if seconds >= 1 else "less than a second"
    return (
        f"{names} into {modules} modules of {request.base}: {size / 1e6:,.0f} MB of weights, {duration}, in "
        f"{path.name}; rounding would take about {estimate_rounding(request.base, blend, config):.2%} of what is merged"
    )


def count_bytes(stored: StoredTensor, precision: str) -> int:
    """Return the bytes of a parameter as written."""
    count = prod(stored.kind[1])
    own = (stored.info.end - stored.info.start) // max(1, prod(stored.info.shape))
    return count * (own if precision == "keep" else torch_dtype(precision).itemsize)


def measure_write_rate(folder: Path) -> float:
    """Measure the bytes per second that this disk writes."""
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / max(1e-6, time.perf_counter() - started)


def run_merge(
    studio: Studio, form: BlendForm, target: MergeTarget, visitor: str = ""
) -> Iterator[Waiting | WriteProgress | MergeDone | Halted]:
    """Merge, yielding progress and then the result. Raises LoRADiffusionError's subclasses."""
    request, path = make_merge_request(studio, form), resolve_output(studio, target)
    config = validate(MergeConfig, {"precision": target.precision}, source="merge")

    def work(line: EventStream) -> MergeDone:
        line.send(WriteProgress())
        path.parent.mkdir(parents=True, exist_ok=True)
        if target.kind == "adapter":
            return write_adapter(request, path, target)
        told = 0

        def on_progress(share: float) -> None:
            nonlocal told
            if int(share * TOLD) > told:
                told = int(share * TOLD)
                line.send(WriteProgress(share))

        task = MergeRequest(base=request.base, entries=request.entries, config=config)
        report, notes = merge_files(task, path, LoadOptions(resolver=studio.resolver), on_progress)
        done = (
            f"{report.merged_modules} modules, {report.num_bytes / 1e6:,.0f} MB; rounding took "
            f"{report.rounding_error:.2%} of what was merged"
        )
        return MergeDone(path=path, text="; ".join((done, *notes)))

    return studio.device.stream(work, visitor)


def write_adapter(request: GenerationRequest, path: Path, target: MergeTarget) -> MergeDone:
    """Write all adapters as a single one."""
    rule = RankRule(rank=target.rank) if target.rank else None
    combined = combine_files(request.entries, path, CombineConfig(rule=rule, base=request.base))
    lost = f"compression lost {combined.report.total.relative:.2%}" if combined.report else "exact"
    return MergeDone(
        path=path, text=f"{len(combined.adapter.layers)} modules, {combined.bytes_after / 1e6:.1f} MB, {lost}"
    )


def format_merge_command(studio: Studio, form: BlendForm, target: MergeTarget) -> str:
    """Return the command that merges the same. Raises ConfigError."""
    request, path = make_merge_request(studio, form), studio.places.output / "merged" / target.file
    words = adapter_flags(form.rows, studio.library())
    if target.kind == "adapter":
        files = [word for word in words if word != "--adapter"]
        rank = ["--rank", str(target.rank)] if target.rank else []
        return shlex.join(["lora-diffusion", "combine", *files, str(path), *rank])
    precision = [] if target.precision == "keep" else ["--precision", target.precision]
    return shlex.join(["lora-diffusion", "merge", "--base", request.base, *words, *precision, "--output", str(path)])
