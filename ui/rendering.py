"""Work on the device as a stream of events that can be stopped: it runs in a thread, its visitor reads along."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


class StoppedError(Exception):
    """Raised inside work whose visitor has gone or pressed Stop."""


@dataclass
class Line:
    """What work says, and whether it should go on."""

    events: "queue.Queue[Any]" = field(default_factory=lambda: queue.Queue[Any]())
    stopped: threading.Event = field(default_factory=threading.Event)

    def say(self, event: object) -> None:
        """Tell the visitor. Raises StoppedError if there is none any more."""
        if self.stopped.is_set():
            raise StoppedError
        self.events.put(event)


@dataclass(frozen=True)
class Failure:
    error: BaseException


END = object()
WAIT_S = 0.2


class Device:
    """The one thing that computes: work waits its turn, and a visitor's own can be stopped."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lines: dict[str, Line] = {}

    def stop(self, visitor: str) -> None:
        """Stop what this visitor has running or waiting, at its next event."""
        if line := self.lines.get(visitor):
            line.stopped.set()

    def streamed(self, work: Callable[[Line], object], visitor: str = "") -> Iterator[Any]:
        """The events of some work as they come, its result last; what it raises is raised here.

        Closing the iterator stops the work at its next event, and waits until everything is put back.
        """
        line = self.lines[visitor] = Line()

        def run() -> None:
            try:
                with self.turn(line):
                    line.events.put(work(line))
            except StoppedError:
                pass
            except BaseException as error:  # noqa: BLE001 (it is raised where somebody listens)
                line.events.put(Failure(error))
            finally:
                line.events.put(END)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (event := line.events.get()) is not END:
                if isinstance(event, Failure):
                    raise event.error
                yield event
        finally:
            line.stopped.set()
            thread.join()

    @contextmanager
    def turn(self, line: Line) -> Iterator[None]:
        """The device for oneself. Raises StoppedError if the visitor has gone before it was free."""
        while not self.lock.acquire(timeout=WAIT_S):
            if line.stopped.is_set():
                raise StoppedError
        try:
            yield
        finally:
            self.lock.release()
