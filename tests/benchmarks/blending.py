"""Speed and memory of blending, compared with copying the weights, a hand-written loop, and diffusers with PEFT.

    python -m tests.benchmarks.blending [--only GROUP]

SD 1.5's UNet with random weights in float32; adapters of rank 16 for its 128 attention projections, in float16 files.
CPU time of the process with one thread. The variants alternate within each round, the first round is dropped, and the
table shows medians. "Copies" are multiples of a `copy_` of the 128 weights (374 MB) in the same run. Each group runs in
a process of its own, most of them with glibc's allocator set to keep freed memory (see the group `allocator`). Writes
`blending.json` beside this script.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.blending_forwards import (
    allocator_group,
    compile_group,
    forwards_with,
    operations_group,
    projections_group,
)
from tests.benchmarks.blending_memory import memory_group, memory_of, sdxl_group, switching_group
from tests.benchmarks.blending_weights import rounding_group, weights_group
from tests.benchmarks.goals import Goal, at_most, compare, not_above, print_missed
from tests.benchmarks.measuring import COUNTS, ROUNDS, Group, in_own_process, machine, table

GROUPS: dict[str, Callable[[], Group]] = {
    "weights": weights_group,
    "rounding": rounding_group,
    "operations": operations_group,
    "projections": projections_group,
    "compile": compile_group,
    "memory": memory_group,
    "switching": switching_group,
    "allocator": allocator_group,
    "sdxl": sdxl_group,
}
GOALS = {
    f"groups/{group}/rows/{what}/{figure}": goal
    for (group, figure), goals in {
        ("weights", "ours"): {
            "apply 1 loaded": at_most(2.0),
            "apply 4 loaded": at_most(3.5),
            "apply 8 loaded": at_most(5.0),
            "switch to another file": at_most(2.2),
            "read a file": not_above(0.426, tolerance=0.5),
            "new weight for one of 4": at_most(3.5),
            "new weights for all 4": at_most(3.5),
            **{f"undo {n}": at_most(1.15) for n in COUNTS},
            **{f"weights changed by apply and undo {n}": at_most(0) for n in COUNTS},
            **{f"register, number {n}": at_most(0.1) for n in (1, 8, 50)},
        },
        ("weights", "of_hand"): {f"apply {n} loaded": at_most(1.1) for n in COUNTS},
        ("rounding", "ours"): {
            "error of 5 in float16": at_most(1.0),
            "apply 5 loaded in float16": not_above(12.686, tolerance=0.5),
            "error of 5 in bfloat16": at_most(1.0),
            "apply 5 loaded in bfloat16": not_above(12.464, tolerance=0.5),
        },
        ("operations", "ours"): {
            **{f"a forward, {n} in place": at_most(1.0) for n in (1, 8, 32)},
            **{f"a forward, {n} in parallel": at_most(1.6) for n in (1, 8)},
            "a forward, 4 blends in 4 samples": at_most(1.6),
        },
        ("projections", "ours"): {
            **{f"projections, {n} in parallel": at_most(1.15) for n in COUNTS},
            "projections, 4 blends in 4 samples": at_most(1.15),
        },
        ("compile", "ours"): {
            f"new graphs: {event}": at_most(0)
            for event in (
                *("the first adapter", "another adapter", "another weight"),
                *("another rank", "several adapters", "undo"),
            )
        },
        ("memory", "ours"): {
            "peak memory, weights mapped, originals from memory": not_above(0.2382, tolerance=0.1),
            "peak memory, weights mapped, originals from file": at_most(0.05),
            "peak memory, weights copied, originals from memory": not_above(0.129, tolerance=0.1),
            "peak memory, weights copied, originals from file": at_most(0.05),
        },
        ("switching", "ours"): {
            f"switch on {base}, {size} registered, {cut}": not_above(recorded, tolerance=0.5)
            for base, size, cut, recorded in (
                ("tiny-sd", 10, "p50", 23.1),
                ("tiny-sd", 10, "p99", 30.0),
                ("tiny-sd", 100, "p50", 23.8),
                ("tiny-sd", 100, "p99", 30.5),
                ("sd1", 10, "p50", 148.3),
                ("sd1", 10, "p99", 196.2),
                ("sd1", 100, "p50", 151.1),
                ("sd1", 100, "p99", 200.6),
            )
        },
        ("allocator", "ours"): {
            "a forward, allocator set by environment": not_above(0.755, tolerance=0.25),
            "a forward, allocator set at run time": not_above(0.685, tolerance=0.25),
        },
        ("sdxl", "ours"): {
            "switch on sdxl in float16": not_above(5.025, tolerance=0.5),
            "switch on sdxl in float16, p50": not_above(1537.8, tolerance=0.5),
            "switch on sdxl in float16, slowest of 10": not_above(1814.8, tolerance=0.5),
        },
    }.items()
    for what, goal in goals.items()
}
WORKERS: dict[str, Callable[..., Any]] = {
    "memory_of": memory_of,
    "forwards_with": forwards_with,
    **{name: lambda work=work: asdict(work()) for name, work in GROUPS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=GROUPS, help="run one group; the other figures stay as they are")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        name, *arguments = options.worker
        found = WORKERS[name](*arguments)
        if found is not None:
            print(json.dumps(found))
        return
    output = Path(__file__).with_name("blending.json")
    groups = json.loads(output.read_text())["groups"] if options.only and output.is_file() else {}
    measured = [options.only] if options.only else list(GROUPS)
    for name in measured:
        started, load = time.perf_counter(), round(os.getloadavg()[0], 1)
        found = in_own_process(name)
        groups[name] = {**found, "wall_seconds": round(time.perf_counter() - started), "load": load}
        ordered = {name: groups[name] for name in GROUPS if name in groups}
        figures = {"machine": machine(), "rounds": ROUNDS, "groups": ordered}
        figures["goals"] = compare(figures, goals_of_groups(ordered))
        output.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(groups, GOALS))
    sys.exit(print_missed(compare({"groups": groups}, goals_of_groups(measured))))


def goals_of_groups(names: Iterable[str]) -> dict[str, Goal]:
    """Return the goals of the figures in these groups."""
    prefixes = tuple(f"groups/{name}/" for name in names)
    return {path: goal for path, goal in GOALS.items() if path.startswith(prefixes)}


if __name__ == "__main__":
    main()
