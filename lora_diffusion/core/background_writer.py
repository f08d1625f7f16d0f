"""Writing a large file beside the arithmetic: one thread hands bytes to the system, one has them put on disk."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class BackgroundWriter:
    """What is written goes to a thread, one piece ahead at most; errors there come up at the next call."""

    def __init__(self, file: BinaryIO, threads: ThreadPoolExecutor) -> None:
        self.file, self.threads = file, threads
        self.writing: Future[int] | None = None
        self.syncing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Hand over bytes, which must not change before the next call."""
        if self.writing is not None:
            self.writing.result()
        self.writing = self.threads.submit(self.file.write, data)
        if self.syncing is None or self.syncing.done():
            self.wait_for_disk()
            self.syncing = self.threads.submit(os.fsync, self.file.fileno())

    def wait_for_disk(self) -> None:
        """Raises what the disk refused: the system says so once, and not to whoever syncs the file later."""
        if self.syncing is not None:
            self.syncing.result()

    def wait(self) -> None:
        """Return when all is written. Raises what writing or syncing raised."""
        if self.writing is not None:
            self.writing.result()
        self.wait_for_disk()


@contextmanager
def background_writer(path: Path) -> Iterator[BackgroundWriter]:
    """A new file to write to; complete, but not all on disk, when the block ends. Raises OSError."""
    with path.open("wb") as file, ThreadPoolExecutor(2) as threads:
        behind = BackgroundWriter(file, threads)
        yield behind
        behind.wait()
