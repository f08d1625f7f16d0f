"""Dry run of a training: check the data and take a few real steps to estimate time and memory.

The steps run in a temporary folder, with the base, buckets, optimizer and machine of the real run, and all of its
checks.
"""

import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, cast

from accelerate import PartialState  # pyright: ignore[reportMissingTypeStubs]

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.core.hardware import describe_machine, peak_memory_mb
from lora_diffusion.data.checks import DatasetReport, format_report, to_json
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.objectives.prior_preservation import class_folder, missing_pictures
from lora_diffusion.training.setup import TrainingContext, run_folder
from lora_diffusion.training.train import train
from lora_diffusion.workflows.training.dataset_check import check_dataset_for_base

_STEPS = 4
"""Number of trial steps; the first one warms up and is not timed."""


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
    """Estimated time and memory of a run, measured over its first steps on this machine."""

    dataset: DatasetReport
    """Result of the dataset check."""
    parameters: int
    """Number of trainable parameters."""
    modules: int
    """Number of modules that are trained."""
    pictures_per_step: int
    """Pictures per optimizer step, over all processes."""
    passes: float
    """Number of passes over the training pictures."""
    class_pictures: int
    """Number of class pictures that are generated before the first step."""
    seconds_per_step: float
    """Duration of one optimizer step."""
    seconds: float
    """Duration of all steps, without samples, validation and the generation of class pictures."""
    memory_mb: float
    """Peak memory in MB, of the GPU if there is one and of the process otherwise."""
    adapter_mb: float
    """Size of the adapter file in MB."""
    is_main_process: bool
    """Whether this process is the one that writes files and prints."""


def estimate_run(config: TrainConfig) -> ResourceEstimate:
    """Take a few training steps without leaving files, and estimate the duration and memory of the whole run.

    Args:
        config: Settings of the run.

    Raises:
        LoRADiffusionError: If the run itself would be refused.
    """
    check_writable(config.output)
    trigger = "" if "{trigger}" in config.captions.template else " ".join(config.trigger_words)
    dataset = check_dataset_for_base(config.data, config.base, trigger)
    contexts: list[TrainingContext] = []
    with tempfile.TemporaryDirectory() as scratch:
        trial = _make_trial_config(config, Path(scratch))
        result = train(trial, on_progress=lambda run, _: contexts.append(run))
        lines = read_log(run_folder(trial.output) / LOG) if result.is_main_process else []
        size = result.path.stat().st_size if result.is_main_process else 0
    run, steps = contexts[0], [(line["seconds"], line["data_seconds"]) for line in lines]
    per_step = config.batch_size * config.gradient_accumulation * run.accelerator.num_processes
    pictures, repeats = run.samples[0].examples, config.data.repeats
    seconds = median([whole - loading for whole, loading in steps[1:]] or [0.0])
    loading = sum(loading for _, loading in steps) / _STEPS
    cached = config.data.cache != "none"
    loads = len(pictures) * config.data.variants / per_step if cached else config.steps
    return ResourceEstimate(
        dataset=dataset,
        parameters=sum(parameter.numel() for parameter in run.parameters.values()),
        modules=len(run.paths),
        pictures_per_step=per_step,
        passes=config.steps * per_step / (sum(example.repeats for example in pictures) * repeats),
        class_pictures=len(_find_missing_class_images(config)),
        seconds_per_step=seconds if cached else seconds + loading,
        seconds=seconds * config.steps + loading * loads,
        memory_mb=peak_memory_mb(),
        adapter_mb=size / 1e6,
        is_main_process=result.is_main_process,
    )


def _find_missing_class_images(config: TrainConfig) -> list[int]:
    """Return the numbers of the class pictures that the run would generate."""
    if config.prior.mode != "pictures":
        return []
    return missing_pictures(config.prior, class_folder(config.prior, run_folder(config.output)))


def _make_trial_config(config: TrainConfig, scratch: Path) -> TrainConfig:
    """Return the config of a short trial in a scratch folder, with one class picture per process."""
    changes: dict[str, dict[str, Any]] = {
        "data": {"cache": "memory" if config.data.cache == "disk" else config.data.cache},
        "prior": {"folder": None, "count": cast(Any, PartialState()).num_processes},
        "samples": {"prompts": ()},
        "tracking": {"trackers": (), "report": False},
    }
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    output = scratch / "trial.safetensors"
    return config.model_copy(update={"output": output, "steps": _STEPS, "save_every": 0, "state_every": 0, **sections})


def format_estimate(estimate: ResourceEstimate, config: TrainConfig) -> str:
    """Format the estimate of a run as lines of text."""
    count, each = f"{estimate.parameters:,} parameters in {estimate.modules} modules", estimate.pictures_per_step
    lines = [
        format_report(estimate.dataset),
        f"{config.base}: {count} would be trained; the adapter file has {estimate.adapter_mb:.1f} MB",
        f"{config.steps} steps of {each} picture{'s' * (each > 1)}, or {estimate.passes:.1f} passes over the data",
        f"{estimate.seconds_per_step:.2f} s per step, {timedelta(seconds=round(estimate.seconds))} in all, without "
        f"samples and validation; {estimate.memory_mb:,.0f} MB of memory at most (after {_STEPS} steps on "
        f"{describe_machine()})",
    ]
    if estimate.class_pictures:
        lines.append(f"{estimate.class_pictures} class pictures would be generated first")
    return "\n".join([*lines, "no file was written; leave out --dry-run to train"])


def estimate_to_json(estimate: ResourceEstimate) -> dict[str, Any]:
    """Return the estimate of a run as plain values, ready for JSON."""
    plain = {key: value for key, value in vars(estimate).items() if key not in ("dataset", "is_main_process")}
    return {"dataset": to_json(estimate.dataset), **plain, "machine": describe_machine()}
