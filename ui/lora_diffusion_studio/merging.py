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

from lora_diffusion.workflows.images.plan import Plan

from lora_diffusion.algebra.svd.rank_selection import RankRule
from lora_diffusion.config.merge import MergeConfig, WeightType
from lora_diffusion.config.settings import validate
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.checkpoint import StoredTensor
from lora_diffusion.merging.merge import estimate_rounding
from lora_diffusion.models.locate import find_matching_checkpoint
from lora_diffusion.workflows.adapters.combine import Combination, combine_files
from lora_diffusion.workflows.images.generate import Means, prepared_blend
from lora_diffusion.workflows.merge import MergePlan, merge_files
from lora_diffusion_studio.forms import Form, adapter_words
from lora_diffusion_studio.rendering import Halted, Line, Waiting
from lora_diffusion_studio.studio import Studio, checked_name

PRECISIONS = get_args(WeightType)
PROBE_BYTES = 2**25
TOLD = 50
"""So often at most a visitor is told how far a merge is."""
COPIES = 2.0
"""A merge takes about so long as copying the files, by tests/benchmarks/merging.py."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be written."""

    name: str
    kind: str = "folder"
    """`folder`, `file` or `adapter`."""
    precision: str = "keep"
    rank: int = 0
    """Of one adapter; 0 keeps it exact."""

    @property
    def file(self) -> str:
        """The name in the studio's folder. Raises ConfigError for one that cannot be."""
        return checked_name(self.name) + ("" if self.kind == "folder" else ".safetensors")


@dataclass(frozen=True)
class Writing:
    """So much of it is done."""

    share: float = 0.0

    @property
    def text(self) -> str:
        return f"writing, {self.share:.0%} done"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written, and what it cost."""

    path: Path
    text: str


def output_of(studio: Studio, target: Target) -> Path:
    """Where it goes. Raises ConfigError for a name that is taken."""
    path = studio.places.output / ("adapters" if target.kind == "adapter" else "merged") / target.file
    if path.exists():
        raise ConfigError(f"{target.name}: is there already; give another name")
    return path


def merge_plan(studio: Studio, form: Form) -> Plan:
    """The table as weights can hold it. Raises ConfigError for what they cannot."""
    if not any(row.on for row in form.rows):
        raise ConfigError("no adapter is on the table; put one there")
    if form.mode != "sum":
        raise ConfigError(f"the mode {form.mode} cannot be held by weights; choose Sum")
    return studio.plan(Form(base=form.base, rows=form.rows, settings={"prompt": "merge"}))


def summary(studio: Studio, form: Form, target: Target) -> str:
    """What merging would do, without doing it. Raises LoRADiffusionError's children."""
    plan, path = merge_plan(studio, form), output_of(studio, target)
    blend = prepared_blend(plan.base, plan.entries, Means(resolver=studio.shelf)).blend
    modules = len({module for entry in blend.active for module in entry.adapter.layers})
    names = ", ".join(f"{row.name.removesuffix('.safetensors')} at {row.weight:g}" for row in form.rows if row.on)
    if target.kind == "adapter":
        ranks = "the exact sum, whose ranks add up" if not target.rank else f"the closest of rank {target.rank}"
        return f"{names}: one adapter of {modules} modules, {ranks}, in {path.name}"
    checkpoint = find_matching_checkpoint(plan.base, blend)
    config = validate(MergeConfig, {"precision": target.precision}, source="merge")
    size = sum(bytes_of(stored, target.precision) for stored in checkpoint.parameters.values())
    seconds = COPIES * size / write_rate(studio.places.output)
    duration = f"about {seconds:.0f} s" if seconds >= 1 else "less than a second"
    return (
        f"{names} into {modules} modules of {plan.base}: {size / 1e6:,.0f} MB of weights, {duration}, in "
        f"{path.name}; rounding would take about {estimate_rounding(plan.base, blend, config):.2%} of what is merged"
    )


def bytes_of(stored: StoredTensor, precision: str) -> int:
    """Of a parameter as it would be written."""
    count = prod(stored.kind[1])
    own = (stored.info.end - stored.info.start) // max(1, prod(stored.info.shape))
    return count * (own if precision == "keep" else torch_dtype(precision).itemsize)


def write_rate(folder: Path) -> float:
    """Bytes a second that this disk takes."""
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / max(1e-6, time.perf_counter() - started)


def merged(
    studio: Studio, form: Form, target: Target, visitor: str = ""
) -> Iterator[Waiting | Writing | Written | Halted]:
    """Merge, with a word at the start and the result at the end. Raises LoRADiffusionError's children."""
    plan, path = merge_plan(studio, form), output_of(studio, target)
    config = validate(MergeConfig, {"precision": target.precision}, source="merge")

    def work(line: Line) -> Written:
        line.say(Writing())
        path.parent.mkdir(parents=True, exist_ok=True)
        if target.kind == "adapter":
            return as_adapter(plan, path, target)
        told = 0

        def on_share(share: float) -> None:
            nonlocal told
            if int(share * TOLD) > told:
                told = int(share * TOLD)
                line.say(Writing(share))

        task = MergePlan(base=plan.base, entries=plan.entries, config=config)
        report, notes = merge_files(task, path, Means(resolver=studio.shelf), on_share)
        done = (
            f"{report.merged_modules} modules, {report.num_bytes / 1e6:,.0f} MB; rounding took "
            f"{report.rounding_error:.2%} of what was merged"
        )
        return Written(path=path, text="; ".join((done, *notes)))

    return studio.device.streamed(work, visitor)


def as_adapter(plan: Plan, path: Path, target: Target) -> Written:
    """One adapter of all."""
    rule = RankRule(rank=target.rank) if target.rank else None
    combined = combine_files(plan.entries, path, Combination(rule=rule, base=plan.base))
    lost = f"compression lost {combined.report.total.relative:.2%}" if combined.report else "exact"
    return Written(
        path=path, text=f"{len(combined.adapter.layers)} modules, {combined.bytes_after / 1e6:.1f} MB, {lost}"
    )


def merge_command(studio: Studio, form: Form, target: Target) -> str:
    """The same on the command line. Raises ConfigError."""
    plan, path = merge_plan(studio, form), studio.places.output / "merged" / target.file
    words = adapter_words(form.rows, studio.library())
    if target.kind == "adapter":
        files = [word for word in words if word != "--adapter"]
        rank = ["--rank", str(target.rank)] if target.rank else []
        return shlex.join(["lora-diffusion", "combine", *files, str(path), *rank])
    precision = [] if target.precision == "keep" else ["--precision", target.precision]
    return shlex.join(["lora-diffusion", "merge", "--base", plan.base, *words, *precision, "--output", str(path)])
