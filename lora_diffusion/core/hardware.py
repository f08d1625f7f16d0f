"""What a process runs on and what it took of it."""

import platform
import resource
import sys

import torch


def peak_memory_mb() -> float:
    """Of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def describe_machine() -> str:
    """Architecture, GPU and threads, for a report."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    count = torch.get_num_threads()
    return f"{platform.machine()}, {gpu}, {count} thread{'s' * (count > 1)}"
