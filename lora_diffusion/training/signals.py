"""Handle Ctrl-C and SIGTERM during training, so that a run stops between two steps and saves its state."""

# Accelerate is untyped.
# pyright: standard

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


class StopRequest:
    """Signal handler that records whether the run was asked to stop."""

    signal: int | None = None
    """Number of the signal that was received; None before."""

    def note(self, number: int, frame: FrameType | None) -> None:
        """Record a signal. A second signal raises KeyboardInterrupt immediately."""
        if self.signal is not None:
            signal.default_int_handler(number, frame)
        self.signal = number

    def sync_stop(self, accelerator: Accelerator) -> bool:
        """Exchange stop requests between processes, and return whether any process received a signal.

        All processes get the same answer, so they stop after the same step. Every process has to call this.
        """
        received: Any = accelerator.gather(torch.tensor([self.signal is not None], device=accelerator.device))
        return bool(received.any())


@contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Handle Ctrl-C and SIGTERM while the context is active, and restore the previous handlers afterwards.

    Python allows signal handlers in the main thread only; in other threads no signal is recorded.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
