"""What blending costs: against copying the touched weights, a loop written by hand, and diffusers with PEFT.

    python tests/benchmarks/blending.py [--only GROUP]

SD 1.5's UNet with random weights in float32; adapters of rank 16 on its 128 attention projections, in float16
files. One thread, CPU time of the process, variants in turn within each round, the first round dropped, medians.
"Copies" are multiples of a `copy_` of the 128 weights (374 MB) in the same run. Each group runs in a process of its
own, most of them with glibc's allocator told to keep its memory (see the group `allocator`). Writes `blending.json`
beside this script.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from blending_forwards import allocator_group, compile_group, forwards_with, operations_group, projections_group
from blending_memory import memory_group, memory_of, sdxl_group, switching_group
from blending_weights import rounding_group, weights_group
from measuring import ROUNDS, Group, in_own_process, machine, table

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
        return print(json.dumps(found)) if found is not None else None
    output = Path(__file__).with_name("blending.json")
    groups = json.loads(output.read_text())["groups"] if options.only and output.is_file() else {}
    for name in [options.only] if options.only else GROUPS:
        started, load = time.perf_counter(), round(os.getloadavg()[0], 1)
        found = in_own_process(name)
        groups[name] = {**found, "wall_seconds": round(time.perf_counter() - started), "load": load}
        ordered = {name: groups[name] for name in GROUPS if name in groups}
        output.write_text(json.dumps({"machine": machine(), "rounds": ROUNDS, "groups": ordered}, indent=1) + "\n")
    print(table(groups))


if __name__ == "__main__":
    main()
