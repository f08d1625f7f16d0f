"""Log of a training run: `log.jsonl`, one JSON object per optimizer step or event."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.core.atomic_files import atomic_file

LOG = "log.jsonl"
"""Name of the log file in a run's folder."""


class RunLog:
    """Writer of a run's log.

    Args:
        folder: The run's folder.
        active: Whether to write at all; True in the main process only.
    """

    def __init__(self, folder: Path, *, active: bool) -> None:
        self.path, self.active = folder / LOG, active

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line with the given values after `step` optimizer steps."""
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def begin(self, step: int) -> None:
        """Remove the lines after `step`, from which the run resumes, or all lines if `step` is 0."""
        if self.active and self.path.is_file():
            lines = [line for line in read_log(self.path) if line["step"] <= step and step > 0]
            with atomic_file(self.path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a log. Stop at an incomplete line, which a killed process may leave at the end."""
    lines: list[dict[str, Any]] = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
