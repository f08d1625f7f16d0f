"""Stopping between two steps: Ctrl-C and SIGTERM are noted, and a run ends where its state can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


class StopRequest:
    """Whether somebody wants the run to stop."""

    signal: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """A second signal does not wait for the end of the step."""
        if self.signal is not None:
            signal.default_int_handler(number, frame)
        self.signal = number

    def synced_stop(self, accelerator: Accelerator) -> bool:
        """Whether any process has been asked; all get the same answer, so that they stop after the same step."""
        asked: Any = accelerator.gather(torch.tensor([self.signal is not None], device=accelerator.device))
        return bool(asked.any())


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Notes Ctrl-C and SIGTERM while the block runs; only the main thread can, elsewhere nothing is noted."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
