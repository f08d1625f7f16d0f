"""Report the hardware and the peak memory use of this process."""

import platform
import resource
import sys

import torch


def peak_memory_mb() -> float:
    """Return the peak memory use in MB: of the GPU if there is one, otherwise of the process (resident set size)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def describe_machine() -> str:
    """Return the CPU architecture, GPU and number of torch threads as one line for reports."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    count = torch.get_num_threads()
    return f"{platform.machine()}, {gpu}, {count} thread{'s' * (count > 1)}"
