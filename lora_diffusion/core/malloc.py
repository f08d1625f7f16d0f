"""Tune glibc's allocator for long CPU runs.

By default glibc maps and unmaps memory for every large tensor. The page faults cost a CPU run of Stable Diffusion about
a fifth of its time. Keeping freed memory is safe in a process that runs one command; a library must not decide this for
the program that uses it, so only the command line calls this module.
"""

import ctypes
import sys

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
"""Parameter numbers of glibc's mallopt(3)."""
_NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> bool:
    """Serve large allocations from the heap and never shrink it.

    Returns:
        Whether the C library accepted the settings; False on systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, _NEVER_TRIM))
