"""Work on the device as a stream of events that can be stopped: it runs in a thread, its visitor reads along.

Gradio's own queue cannot end work that is under way, nor say what it does. So its events start at once, and wait here.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WAIT_S = 0.2
END = object()


class StoppedError(Exception):
    """Raised inside work whose visitor has gone or pressed Stop."""


@dataclass(frozen=True)
class Waiting:
    """So many are served before."""

    before: int

    @property
    def text(self) -> str:
        return f"waiting for the device; {self.before} before you"


@dataclass(frozen=True)
class Halted:
    """The work was stopped; everything is as it was before."""

    text: str = "stopped"


@dataclass(frozen=True)
class Failure:
    error: BaseException


@dataclass(eq=False)
class EventStream:
    """Events of a task, and whether it should stop."""

    events: "queue.Queue[Any]" = field(default_factory=lambda: queue.Queue[Any]())
    stopped: threading.Event = field(default_factory=threading.Event)

    def send(self, event: object) -> None:
        """Send an event to the visitor. Raises StoppedError if the visitor has left."""
        if self.stopped.is_set():
            raise StoppedError
        self.events.put(event)


class DeviceQueue:
    """Runs tasks one at a time, in order of arrival; each can be stopped."""

    def __init__(self) -> None:
        self.turn_taken = threading.Condition()
        self.lines: list[EventStream] = []
        """The one at work, then those that wait."""
        self.of_visitor: dict[str, EventStream] = {}

    def stop(self, visitor: str) -> None:
        """Stop this visitor's running or waiting task at its next event."""
        if line := self.of_visitor.get(visitor):
            line.stopped.set()

    def stream(self, work: Callable[[EventStream], object], visitor: str = "") -> Iterator[Any]:
        """Yield the events of a task, its result or `Halted` last; its errors are raised here.

        Closing the iterator stops the work at its next event, and waits until everything is put back.
        """
        line = self.of_visitor[visitor] = EventStream()
        thread = threading.Thread(target=self.run, args=(work, line), daemon=True)
        thread.start()
        try:
            while (event := line.events.get()) is not END:
                if isinstance(event, Failure):
                    raise event.error
                yield event
        finally:
            line.stopped.set()
            thread.join()
            if self.of_visitor.get(visitor) is line:
                del self.of_visitor[visitor]

    def run(self, work: Callable[[EventStream], object], line: EventStream) -> None:
        """In the thread: wait, work, and tell how it ended."""
        try:
            with self.exclusive(line):
                line.events.put(work(line))
        except StoppedError:
            line.events.put(Halted())
        except BaseException as error:  # noqa: BLE001 (it is raised where somebody listens)
            line.events.put(Failure(error))
        finally:
            line.events.put(END)

    @contextmanager
    def exclusive(self, line: EventStream) -> Iterator[None]:
        """Hold the device exclusively. Raises StoppedError if the visitor leaves while waiting."""
        with self.turn_taken:
            self.lines.append(line)
        try:
            with self.turn_taken:
                before = 0
                while self.lines[0] is not line:
                    if self.lines.index(line) != before:
                        before = self.lines.index(line)
                        line.send(Waiting(before))
                    self.turn_taken.wait(WAIT_S)
                    if line.stopped.is_set():
                        raise StoppedError
            yield
        finally:
            with self.turn_taken:
                self.lines.remove(line)
                self.turn_taken.notify_all()
