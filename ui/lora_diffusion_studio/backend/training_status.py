"""The status of a training run, read from the files that it writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.workflows.training.run import SUMMARY_FILE

_PACE_STEPS = 20
"""Number of recent steps from which the remaining time is estimated."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The status of a training run."""

    text: str
    running: bool
    losses: tuple[tuple[int, float], ...]
    """Pairs of step and loss."""
    sample_sheet: Path | None
    """Image of all samples so far."""
    report: Path | None
    """HTML report of a finished run."""
    adapter: Path | None
    """The adapter of a finished run."""


def read_total_steps(run_folder: Path) -> int:
    """Return the number of steps that a run was started with, or 0 if it is unknown."""
    try:
        return int(json.loads((run_folder / SUMMARY_FILE).read_text(encoding="utf-8"))["settings"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _format_time_left(log: Sequence[Mapping[str, Any]], total_steps: int) -> str:
    """Return `, 1:05 left` (minutes and seconds), or the empty string if it is unknown."""
    durations = [line["seconds"] for line in log[-_PACE_STEPS:] if "seconds" in line]
    if not durations or total_steps <= log[-1]["step"]:
        return ""
    seconds = round(sum(durations) / len(durations) * (total_steps - log[-1]["step"]))
    return f", {seconds // 60}:{seconds % 60:02} left"


def format_status(
    log: Sequence[Mapping[str, Any]], total_steps: int, *, running: bool, exit_code: int | None, output: Path
) -> str:
    """Return the status of a run in one sentence.

    Args:
        log: Log lines with `step`, `loss` and `seconds`.
        total_steps: Number of steps of the whole run; 0 if unknown.
        running: Whether the process runs.
        exit_code: Exit code of the process; None if this studio has not started it, or it runs.
        output: File with the process's output, for the error message of a failed run.
    """
    of_total = f" of {total_steps}" if total_steps else ""
    progress = f"step {log[-1]['step']}{of_total}, loss {log[-1]['loss']:.4f}" if log else ""
    if running:
        return f"Training: {progress}{_format_time_left(log, total_steps)}" if log else "Preparing the training data"
    if exit_code is None:
        return f"Not running; last at {progress}" if log else "Not started"
    if exit_code == 0:
        return f"Finished: {progress}"
    if exit_code > 128 or exit_code < 0:
        return f"Stopped at {progress or 'step 0'}. Click Start training to resume."
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"Failed: {(errors or lines or ['no error message'])[-1]}"
