"""Merging: writes the current blend as a checkpoint or as a single adapter."""

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
from lora_diffusion.config.generate import LoadConfig
from lora_diffusion.config.merge import MergeConfig, WeightType
from lora_diffusion.config.settings import validate
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.checkpoint import StoredTensor
from lora_diffusion.merging.merge import estimate_rounding
from lora_diffusion.models.locate import find_matching_checkpoint
from lora_diffusion.workflows.adapters.combine import combine_files
from lora_diffusion.workflows.images.generate import load_and_resolve_blend
from lora_diffusion.workflows.images.request import GenerationRequest
from lora_diffusion.workflows.merge import MergeRequest, merge_files
from lora_diffusion_studio.backend.config import check_file_name
from lora_diffusion_studio.backend.device_queue import Queued, Stopped, Task
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.blend_form import DEFAULT_MODE, BlendForm, adapter_flags

PRECISIONS = get_args(WeightType)
_PROBE_BYTES = 2**25
_MAX_PROGRESS_EVENTS = 50
_TIME_PER_COPY = 2.0
"""Duration of a merge relative to writing the files, measured by tests/benchmarks/merging.py."""


@dataclass(frozen=True, kw_only=True)
class MergeTarget:
    """The values of the Merge tab: what a merge writes."""

    name: str
    """Name of the file or folder, without suffix."""
    kind: str = "folder"
    """`folder` (diffusers layout), `file` (single-file checkpoint) or `adapter`."""
    precision: str = MergeConfig.model_fields["precision"].default
    """Data type of a checkpoint's weights; `keep` for that of the base model."""
    rank: int = 0
    """Rank of a merged adapter. 0 keeps the sum exact: the ranks add up."""

    @property
    def file_name(self) -> str:
        """Name of the file or folder. Raises ConfigError if it is not a valid file name."""
        return check_file_name(self.name) + ("" if self.kind == "folder" else ".safetensors")


@dataclass(frozen=True)
class WriteProgress:
    """Progress of a merge."""

    fraction: float = 0.0

    @property
    def text(self) -> str:
        """Status message."""
        return f"Merging, {self.fraction:.0%} written"


@dataclass(frozen=True, kw_only=True)
class MergeDone:
    """The file or folder that was written, and a summary."""

    path: Path
    text: str


def _target_path(studio: Studio, target: MergeTarget) -> Path:
    return studio.config.output / ("adapters" if target.kind == "adapter" else "merged") / target.file_name


def _check_target(studio: Studio, target: MergeTarget) -> Path:
    """Return the path to write. Raises ConfigError if it exists."""
    path = _target_path(studio, target)
    if path.exists():
        raise ConfigError(f"{target.name}: {path} already exists; choose another name")
    return path


def _make_merge_request(studio: Studio, form: BlendForm) -> GenerationRequest:
    """Return the form as a request. Raises ConfigError if the blend cannot be merged into weights."""
    if not any(slot.enabled for slot in form.slots):
        raise ConfigError("the blend has no enabled adapter; add one on the Blend tab")
    if form.mode != DEFAULT_MODE:
        raise ConfigError(
            f"the blend mode {form.mode!r} cannot be merged into weights; set the blend mode to Sum on the Blend tab"
        )
    return studio.make_request(BlendForm(base=form.base, slots=form.slots, settings={"prompt": "merge"}))


def summarize_merge(studio: Studio, form: BlendForm, target: MergeTarget) -> str:
    """Return what a merge would write, its size, duration and rounding error, without merging.

    Raises:
        ConfigError: If the blend cannot be merged, or the name is invalid or taken.
        LoRADiffusionError: If an adapter or the base model cannot be read.
    """
    request, path = _make_merge_request(studio, form), _check_target(studio, target)
    blend = load_and_resolve_blend(request.base, request.entries, LoadConfig(), studio.resolver).blend
    modules = len({module for entry in blend.active for module in entry.adapter.layers})
    enabled = [slot for slot in form.slots if slot.enabled]
    names = ", ".join(f"{slot.name.removesuffix('.safetensors')} (weight {slot.weight:g})" for slot in enabled)
    if target.kind == "adapter":
        rank = f"truncated to rank {target.rank}" if target.rank else "exact, so the ranks add up"
        return f"{path.name}: one adapter of {modules} modules from {names}; {rank}"
    checkpoint = find_matching_checkpoint(request.base, blend)
    config = validate(MergeConfig, {"precision": target.precision}, source="merge")
    size = sum(_count_bytes(stored, target.precision) for stored in checkpoint.parameters.values())
    seconds = _TIME_PER_COPY * size / _measure_write_rate(studio.config.output)
    duration = f"about {seconds:.0f} s" if seconds >= 1 else "less than a second"
    rounding = estimate_rounding(request.base, blend, config)
    return (
        f"{path.name}: {request.base} with {names} merged into {modules} modules; {size / 1e6:,.0f} MB, {duration}; "
        f"expected rounding error {rounding:.2%} of the merged change"
    )


def _count_bytes(stored: StoredTensor, precision: str) -> int:
    """Return the number of bytes that a parameter takes in this precision."""
    count = prod(stored.kind[1])
    stored_itemsize = (stored.info.end - stored.info.start) // max(1, prod(stored.info.shape))
    return count * (stored_itemsize if precision == "keep" else torch_dtype(precision).itemsize)


def _measure_write_rate(folder: Path) -> float:
    """Return the bytes per second that can be written to a folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(bytes(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return _PROBE_BYTES / max(1e-6, time.perf_counter() - started)


def run_merge(
    studio: Studio, form: BlendForm, target: MergeTarget, session_id: str = ""
) -> Iterator[Queued | WriteProgress | MergeDone | Stopped]:
    """Merge on the device queue, yielding the progress and then the result.

    Raises:
        ConfigError: If the blend cannot be merged, or the name is invalid or taken (at once).
        LoRADiffusionError: If merging fails (while iterating).
    """
    request, path = _make_merge_request(studio, form), _check_target(studio, target)

    def work(task: Task) -> MergeDone:
        task.send(WriteProgress())
        path.parent.mkdir(parents=True, exist_ok=True)
        if target.kind == "adapter":
            return _write_adapter(request, path, target)
        return _write_checkpoint(studio, request, path, target, task)

    return studio.device.stream(work, session_id)


def _write_checkpoint(
    studio: Studio, request: GenerationRequest, path: Path, target: MergeTarget, task: Task
) -> MergeDone:
    events_sent = 0

    def on_progress(fraction: float) -> None:
        nonlocal events_sent
        if int(fraction * _MAX_PROGRESS_EVENTS) > events_sent:
            events_sent = int(fraction * _MAX_PROGRESS_EVENTS)
            task.send(WriteProgress(fraction))

    config = validate(MergeConfig, {"precision": target.precision}, source="merge")
    merge = MergeRequest(base=request.base, entries=request.entries, config=config)
    report, notes = merge_files(merge, path, LoadConfig(), studio.resolver, on_progress)
    summary = (
        f"{report.merged_modules} modules, {report.num_bytes / 1e6:,.0f} MB; rounding error "
        f"{report.rounding_error:.2%} of the merged change"
    )
    return MergeDone(path=path, text="; ".join((summary, *notes)))


def _write_adapter(request: GenerationRequest, path: Path, target: MergeTarget) -> MergeDone:
    rule = RankRule(rank=target.rank) if target.rank else None
    combined = combine_files(request.entries, path, CombineConfig(rule=rule, base=request.base))
    loss = f"truncation error {combined.report.total.relative:.2%}" if combined.report else "exact"
    return MergeDone(
        path=path, text=f"{len(combined.adapter.layers)} modules, {combined.bytes_after / 1e6:.1f} MB, {loss}"
    )


def format_merge_command(studio: Studio, form: BlendForm, target: MergeTarget) -> str:
    """Return the shell command of the same merge.

    Raises:
        ConfigError: If the blend cannot be merged, or the name is invalid.
    """
    request, path = _make_merge_request(studio, form), _target_path(studio, target)
    flags = adapter_flags(form.slots, studio.open_library())
    if target.kind == "adapter":
        files = [word for word in flags if word != "--adapter"]
        rank = ["--rank", str(target.rank)] if target.rank else []
        return shlex.join(["lora-diffusion", "combine", *files, str(path), *rank])
    precision = [] if target.precision == "keep" else ["--precision", target.precision]
    return shlex.join(["lora-diffusion", "merge", "--base", request.base, *flags, *precision, "--output", str(path)])
