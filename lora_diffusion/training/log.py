"""What a run tells while it goes on: a line of JSON for each step and event, kept through any stop."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.core.atomic_files import atomic_file

LOG = "log.jsonl"


class RunLog:
    """Appends lines to the log in a run's folder; `active` is off in all processes but one."""

    def __init__(self, folder: Path, *, active: bool) -> None:
        self.path, self.active = folder / LOG, active

    def add(self, step: int, facts: Mapping[str, Any]) -> None:
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **facts}) + "\n")

    def begin(self, step: int) -> None:
        """Forget what comes after a step that a run goes on from, or everything at 0."""
        if self.active and self.path.is_file():
            kept = [line for line in read_log(self.path) if line["step"] <= step and step > 0]
            with atomic_file(self.path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
