"""Training with a sheet of samples, a summary in JSON and an HTML report in the folder of the run."""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.adapter import adapter_hash
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.core.hardware import describe_machine, peak_memory_mb
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.recipe import library_versions
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.setup import TrainingContext
from lora_diffusion.training.train import TrainResult, train
from lora_diffusion.workflows.training.rank_allocation import ranks_by_block
from lora_diffusion.workflows.training.report import render_report
from lora_diffusion.workflows.training.sample_sheet import draw_sheet

SUMMARY_FILE = "run.json"
"""Name of the summary in the folder of a run."""
REPORT_FILE = "report.html"
"""Name of the report in the folder of a run."""


def train_and_report(config: TrainConfig) -> TrainResult:
    """Train an adapter, update a sheet of samples during the run, and write `report.html` at the end.

    Args:
        config: Settings of the run. The report is written only with `tracking.report`, and not if the run was stopped.

    Raises:
        LoRADiffusionError: If a setting, the base, the data or the output is invalid.
    """
    started, contexts = time.perf_counter(), list[TrainingContext]()

    def report_progress(run: TrainingContext, _step: int) -> None:
        contexts[:] = [run]
        if run.accelerator.is_main_process:
            draw_sheet(run.folder, config.samples.prompts)

    result = train(config, on_progress=report_progress)
    if config.tracking.report and result.is_main_process and not result.stopped:
        summary = _summarize_run(contexts[0], result, time.perf_counter() - started)
        with atomic_file(contexts[0].folder / SUMMARY_FILE) as part:
            part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        write_report(contexts[0].folder)
    return result


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write the HTML report of a finished run from the files in its folder.

    Returns:
        The path of the report.

    Raises:
        ConfigError: If the folder has no summary or no log.
        OutputError: If the report cannot be written.
    """
    folder = Path(folder)
    try:
        summary: Mapping[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        log = read_log(folder / LOG)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder}: has no {Path(str(error.filename)).name}; give the NAME-run folder of a run that has ended"
        ) from None
    draw_sheet(folder, summary["settings"]["samples"]["prompts"])
    with atomic_file(folder / REPORT_FILE) as part:
        part.write_text(render_report(folder, summary, log), encoding="utf-8")
    return folder / REPORT_FILE


def _summarize_run(run: TrainingContext, result: TrainResult, seconds: float) -> dict[str, Any]:
    """Return the summary of a finished run, for `run.json`."""
    pictures = run.samples[0]
    step_seconds = [line["seconds"] for line in read_log(run.folder / LOG) if "seconds" in line]
    return {
        "name": result.adapter.metadata.name,
        "settings": run.config.model_dump(mode="json"),
        "base": run.base.name,
        "base_hash": run.base.hash,
        "adapter": str(result.path.name),
        "adapter_hash": adapter_hash(result.adapter),
        "steps_done": result.steps,
        "best_step": result.best.step if result.best else None,
        "first_loss": result.first_loss,
        "last_loss": result.last_loss,
        "pictures": len(pictures.examples),
        "held_out": len(run.held_out.views) if run.held_out else 0,
        "buckets": ", ".join(f"{n} of {b.width}x{b.height}" for b, n in sorted(Counter(pictures.buckets).items())),
        "allocation": ranks_by_block(result.adapter),
        "parameters": sum(p.numel() for p in run.parameters.values()),
        "seconds": seconds,
        "seconds_per_step": sum(step_seconds) / max(1, len(step_seconds)),
        "memory_mb": peak_memory_mb(),
        "machine": describe_machine(),
        "versions": library_versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
