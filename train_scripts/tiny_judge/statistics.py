"""Shares with their intervals, and the machine that a figure was measured on."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion, in 0..1."""
    if count == 0:
        return 0.0, 1.0
    z, share = 1.96, right / count
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def share_of(hits: Sequence[bool]) -> dict[str, float | int | list[float]]:
    """Share of hits with its count and 95 % interval."""
    share = sum(hits) / max(1, len(hits))
    interval = [round(bound, 4) for bound in wilson_interval(sum(hits), len(hits))]
    return {"share": round(share, 4), "right": sum(hits), "count": len(hits), "interval95": interval}


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, torch and threads."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": os.cpu_count() or 0,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
