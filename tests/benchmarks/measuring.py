"""Measurement for the blending benchmark: alternating rounds of variants, separate processes, rows of a table."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.goals import Goal

ROUNDS = 6
OWN_ROUNDS = 2
"""So many rounds without diffusers, which is slow, for each one with it."""
COUNTS = (1, 4, 8)
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""glibc never gives memory back, so that it need not be fetched, and zeroed, again."""
SAMPLES = ("one", "two", "three", "four")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table; None if not measured."""

    what: str
    unit: str = "copies"
    ours: float | None = None
    hand: float | None = None
    peer: float | None = None
    of_hand: float | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    rows: list[Row]
    details: dict[str, Any]


class Rounds:
    """CPU seconds of this process by name of the variant; the first measurement of each is a warm-up."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, work: Callable[[], Any]) -> None:
        started = time.process_time()
        work()
        self.seconds[name].append(time.process_time() - started)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name][1:])

    def ratio(self, name: str, unit: str = "copy") -> float:
        return round(self.median(name) / self.median(unit), 3)

    def row(self, what: str, name: str, *, unit: str = "copy") -> Row:
        """Make a row of the measurements "ours <name>", "hand <name>" and "peer <name>"."""
        timed = {who: f"{who} {name}" for who in ("ours", "hand", "peer")}
        ratios = {who: self.ratio(full, unit) for who, full in timed.items() if full in self.seconds}
        of_hand = self.ratio(timed["ours"], timed["hand"]) if "hand" in ratios else None
        return Row(what=what, unit="copies" if unit == "copy" else f"x {unit}", of_hand=of_hand, **ratios)

    def details(self) -> dict[str, Any]:
        """Return median and range in ms."""
        kept = {name: [1000 * value for value in values[1:]] for name, values in self.seconds.items()}
        return {
            n: {"ms": round(statistics.median(v), 1), "range": [round(min(v), 1), round(max(v), 1)]}
            for n, v in kept.items()
        }


def status_mb(field: str) -> float:
    """Return a memory figure of this process from /proc, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def worker(name: str, *arguments: str, keeping: bool = True) -> subprocess.Popen[str]:
    """Return the command that runs a measurement in a new process."""
    environment = {key: value for key, value in os.environ.items() if key not in KEEPING}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", **(KEEPING if keeping else {})}
    command = [sys.executable, "-m", "tests.benchmarks.blending", "--worker", name, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def in_own_process(name: str, *arguments: str, keeping: bool = True) -> Any:
    """Run a measurement in a new process and return its result."""
    with worker(name, *arguments, keeping=keeping) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} {arguments} failed; its own message is above")
    return json.loads(output.splitlines()[-1])


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    libraries = {name: version(name) for name in ("torch", "diffusers", "peft")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = {"processor": names[0], "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()}
    return {"architecture": platform.machine(), **cpu, "memory_gb": round(memory, 1), "threads": 1, **libraries}


def table(groups: dict[str, Any], goals: Mapping[str, Goal]) -> str:
    lines = ["| | unit | ours | by hand | diffusers + PEFT | goal | ours / by hand |", "|---|---|---|---|---|---|---|"]
    for name, group in groups.items():
        for row in group["rows"]:
            goal = goals.get(f"groups/{name}/rows/{row['what']}/ours")
            values = [row["ours"], row["hand"], row["peer"], goal.limit if goal else None, row["of_hand"]]
            cells = ["" if value is None else f"{value:g}" for value in values]
            lines.append(f"| {row['what']} | {row['unit']} | {' | '.join(cells)} |")
    return "\n".join(lines)
