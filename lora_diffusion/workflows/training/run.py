"""Training with everything around it: facts of the run, samples as they come, and the report."""

import json
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
from lora_diffusion.workflows.training.report import write_page
from lora_diffusion.workflows.training.sample_sheet import draw_sheet

FACTS, REPORT = "run.json", "report.html"


def train_and_report(config: TrainConfig) -> TrainResult:
    """`train`, with a sheet of samples that grows meanwhile, and `report.html` in the run's folder at the end."""
    started, seen = time.perf_counter(), list[TrainingContext]()

    def watch(run: TrainingContext, _step: int) -> None:
        seen[:] = [run]
        if run.accelerator.is_main_process:
            draw_sheet(run.folder, config.samples.prompts)

    result = train(config, watch=watch)
    if config.tracking.report and result.is_main_process and not result.stopped:
        facts = to_json(seen[0], result, time.perf_counter() - started)
        with atomic_file(seen[0].folder / FACTS) as part:
            part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        write_report(seen[0].folder)
    return result


def write_report(folder: Path) -> Path:
    """Write the page of a run's folder from what is in it. Raises ConfigError if the run has not come to its end."""
    try:
        facts: Mapping[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        log = read_log(folder / LOG)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder}: has no {Path(str(error.filename)).name}; give the NAME-run folder of a run that has ended"
        ) from None
    draw_sheet(folder, facts["settings"]["samples"]["prompts"])
    with atomic_file(folder / REPORT) as part:
        part.write_text(write_page(folder, facts, log), encoding="utf-8")
    return folder / REPORT


def to_json(run: TrainingContext, result: TrainResult, seconds: float) -> dict[str, Any]:
    """Return the facts of a finished run."""
    pictures = run.samples[0]
    taken = [line["seconds"] for line in read_log(run.folder / LOG) if "seconds" in line]
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
        "seconds_per_step": sum(taken) / max(1, len(taken)),
        "memory_mb": peak_memory_mb(),
        "machine": describe_machine(),
        "versions": library_versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
