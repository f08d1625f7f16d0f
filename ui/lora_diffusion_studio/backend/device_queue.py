"""The device queue: runs one task at a time in a thread and streams its events; tasks can be stopped.

Gradio's own queue can neither stop a running task nor report its progress. Therefore Gradio starts every handler at
once, and the handlers wait in this queue.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_POLL_S = 0.2
_END = object()


class TaskStoppedError(Exception):
    """Raised inside a task whose user pressed Stop or closed the page."""


@dataclass(frozen=True)
class Queued:
    """The task waits for other tasks."""

    ahead: int
    """Number of tasks that run before this one."""

    @property
    def text(self) -> str:
        """Status message."""
        return f"Queued, {self.ahead} ahead of you"


@dataclass(frozen=True)
class Stopped:
    """The task was stopped, and the base model is as it was before."""

    text: str = "Stopped"


@dataclass(frozen=True)
class _Failure:
    error: BaseException


@dataclass(eq=False)
class Task:
    """A running or queued task: its events, and whether it should stop."""

    events: "queue.Queue[Any]" = field(default_factory=lambda: queue.Queue[Any]())
    stop_requested: threading.Event = field(default_factory=threading.Event)

    def send(self, event: object) -> None:
        """Send an event to the user.

        Raises:
            TaskStoppedError: If the task should stop.
        """
        if self.stop_requested.is_set():
            raise TaskStoppedError
        self.events.put(event)


class DeviceQueue:
    """Runs tasks one at a time, in order of arrival."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: list[Task] = []
        """The running task, then the waiting ones."""
        self._task_of_session: dict[str, Task] = {}

    def stop(self, session_id: str) -> None:
        """Stop the task of a session, whether it runs or waits, at its next event."""
        if task := self._task_of_session.get(session_id):
            task.stop_requested.set()

    def stream(self, work: Callable[[Task], object], session_id: str = "") -> Iterator[Any]:
        """Run a function on the device and yield the events that it sends.

        The last event is the function's result, or `Stopped`. Its exceptions are raised here. Closing the iterator
        stops the function at its next event and waits until it has ended.
        """
        task = self._task_of_session[session_id] = Task()
        thread = threading.Thread(target=self._run, args=(work, task), daemon=True)
        thread.start()
        try:
            while (event := task.events.get()) is not _END:
                if isinstance(event, _Failure):
                    raise event.error
                yield event
        finally:
            task.stop_requested.set()
            thread.join()
            if self._task_of_session.get(session_id) is task:
                del self._task_of_session[session_id]

    def _run(self, work: Callable[[Task], object], task: Task) -> None:
        try:
            with self._exclusive(task):
                task.events.put(work(task))
        except TaskStoppedError:
            task.events.put(Stopped())
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that reads the events)
            task.events.put(_Failure(error))
        finally:
            task.events.put(_END)

    @contextmanager
    def _exclusive(self, task: Task) -> Generator[None]:
        """Wait until all earlier tasks have ended. Raises TaskStoppedError if the task is stopped while it waits."""
        with self._changed:
            self._tasks.append(task)
        try:
            with self._changed:
                reported = 0
                while self._tasks[0] is not task:
                    ahead = self._tasks.index(task)
                    if ahead != reported:
                        reported = ahead
                        task.send(Queued(ahead))
                    self._changed.wait(_POLL_S)
                    if task.stop_requested.is_set():
                        raise TaskStoppedError
            yield
        finally:
            with self._changed:
                self._tasks.remove(task)
                self._changed.notify_all()
