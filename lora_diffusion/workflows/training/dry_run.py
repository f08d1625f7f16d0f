"""What a run would need: its data looked at, and its first steps really taken, in a folder that is thrown away.

Nothing is estimated by formula: a step's time and memory depend on base, buckets, optimizer and machine, all of which
the first steps have. Everything that a run checks is checked.
"""

import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import PartialState

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.core.hardware import describe_machine, peak_memory_mb
from lora_diffusion.data.checks import DatasetReport, format_report, to_json
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.objectives.prior_preservation import class_folder, missing_pictures
from lora_diffusion.training.setup import TrainingContext, run_folder
from lora_diffusion.training.train import train
from lora_diffusion.workflows.training.dataset_check import check_dataset_for_base

STEPS = 4
"""The first is left out, as it warms up."""


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
    """Estimated time and memory of a run, from its first steps on this machine."""

    dataset: DatasetReport
    parameters: int
    """Trainable ones."""
    modules: int
    pictures_per_step: int
    """Over all processes."""
    passes: float
    """How often the run goes through its pictures."""
    class_pictures: int
    """To be made before the first step."""
    seconds_per_step: float
    seconds: float
    """Of all steps; samples, validation and class pictures come on top."""
    memory_mb: float
    """At most, of the GPU if there is one."""
    adapter_mb: float
    is_main_process: bool


def estimate_run(config: TrainConfig) -> ResourceEstimate:
    """Run a few steps without leaving files, and estimate the whole run. Raises what the run would raise."""
    check_writable(config.output)
    trigger = "" if "{trigger}" in config.captions.template else " ".join(config.trigger_words)
    dataset = check_dataset_for_base(config.data, config.base, trigger)
    seen: list[TrainingContext] = []
    with tempfile.TemporaryDirectory() as scratch:
        trial = make_trial_config(config, Path(scratch))
        result = train(trial, watch=lambda run, _: seen.append(run))
        lines = read_log(run_folder(trial.output) / LOG) if result.is_main_process else []
        size = result.path.stat().st_size if result.is_main_process else 0
    run, steps = seen[0], [(line["seconds"], line["data_seconds"]) for line in lines]
    per_step = config.batch_size * config.gradient_accumulation * run.accelerator.num_processes
    pictures, repeats = run.samples[0].examples, config.data.repeats
    seconds = median([whole - loading for whole, loading in steps[1:]] or [0.0])
    loading = sum(loading for _, loading in steps) / STEPS
    cached = config.data.cache != "none"
    loads = len(pictures) * config.data.variants / per_step if cached else config.steps
    return ResourceEstimate(
        dataset=dataset,
        parameters=sum(parameter.numel() for parameter in run.parameters.values()),
        modules=len(run.paths),
        pictures_per_step=per_step,
        passes=config.steps * per_step / (sum(example.repeats for example in pictures) * repeats),
        class_pictures=len(find_missing_class_images(config)),
        seconds_per_step=seconds if cached else seconds + loading,
        seconds=seconds * config.steps + loading * loads,
        memory_mb=peak_memory_mb(),
        adapter_mb=size / 1e6,
        is_main_process=result.is_main_process,
    )


def find_missing_class_images(config: TrainConfig) -> list[int]:
    """Return the seeds of class pictures that the run would generate."""
    if config.prior.mode != "pictures":
        return []
    return missing_pictures(config.prior, class_folder(config.prior, run_folder(config.output)))


def make_trial_config(config: TrainConfig, scratch: Path) -> TrainConfig:
    """Return the config of a short trial in a scratch folder, with a single class picture."""
    changes: dict[str, dict[str, Any]] = {
        "data": {"cache": "memory" if config.data.cache == "disk" else config.data.cache},
        "prior": {"folder": None, "count": PartialState().num_processes},
        "samples": {"prompts": ()},
        "tracking": {"trackers": (), "report": False},
    }
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    output = scratch / "trial.safetensors"
    return config.model_copy(update={"output": output, "steps": STEPS, "save_every": 0, "state_every": 0, **sections})


def format_estimate(needs: ResourceEstimate, config: TrainConfig) -> str:
    """Format the estimate as lines of text."""
    count, each = f"{needs.parameters:,} parameters in {needs.modules} modules", needs.pictures_per_step
    lines = [
        format_report(needs.dataset),
        f"{config.base}: {count} would learn, and be a file of {needs.adapter_mb:.1f} MB",
        f"{config.steps} steps of {each} picture{'s' * (each > 1)}, which is {needs.passes:.1f} passes over the data",
        f"{needs.seconds_per_step:.2f} s a step, so {timedelta(seconds=round(needs.seconds))} without samples and "
        f"validation; {needs.memory_mb:,.0f} MB of memory at most (after {STEPS} steps on {describe_machine()})",
    ]
    if needs.class_pictures:
        lines.append(f"{needs.class_pictures} class pictures would be made first")
    return "\n".join([*lines, "nothing was kept; leave out --dry-run to train"])


def estimate_to_json(needs: ResourceEstimate) -> dict[str, Any]:
    """Return the estimate as plain values, ready for JSON."""
    plain = {key: value for key, value in vars(needs).items() if key not in ("dataset", "is_main_process")}
    return {"dataset": to_json(needs.dataset), **plain, "machine": describe_machine()}
