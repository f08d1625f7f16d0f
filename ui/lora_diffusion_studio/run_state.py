"""How a training run stands, from what it writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.workflows.training.run import SUMMARY_FILE

PACE_STEPS = 20
"""So many of the last steps say how long the rest will take."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The status of a run."""

    text: str
    running: bool
    losses: tuple[tuple[int, float], ...]
    sheet: Path | None
    report: Path | None
    adapter: Path | None


def read_total_steps(run: Path) -> int:
    """Return the number of steps of a finished run, from its facts; 0 if there are none."""
    try:
        return int(json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))["settings"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def format_time_left(log: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Format `, 1:05 left`, at the pace of the last steps; empty if unknown."""
    paces = [line["seconds"] for line in log[-PACE_STEPS:] if "seconds" in line]
    if not paces or steps <= log[-1]["step"]:
        return ""
    seconds = round(sum(paces) / len(paces) * (steps - log[-1]["step"]))
    return f", {seconds // 60}:{seconds % 60:02} left"


def format_status(log: Sequence[Mapping[str, Any]], steps: int, *, running: bool, ended: int | None, said: Path) -> str:
    """Describe the status of a run in a sentence."""
    of = f" of {steps}" if steps else ""
    where = f"step {log[-1]['step']}{of}, loss {log[-1]['loss']:.4f}" if log else "getting ready"
    if running:
        return where + format_time_left(log, steps)
    if ended is None:
        return f"not running; {where}" if log else "not started"
    if ended == 0:
        return f"finished: {where}"
    if ended > 128 or ended < 0:
        return f"stopped after {where}; Start goes on from there"
    last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line.removeprefix("error: ") for line in last if line.startswith("error: ")]
    return f"failed: {(errors or last or ['no message'])[-1]}"


def existing_or_none(path: Path) -> Path | None:
    return path if path.is_file() else None
