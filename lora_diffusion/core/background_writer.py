"""Write a large file in background threads while the main thread computes."""

import os
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class BackgroundWriter:
    """Writes bytes to a file in one thread and syncs the file to disk in another.

    At most one chunk is pending. An error in a thread is raised by the next call.
    """

    def __init__(self, file: BinaryIO, threads: ThreadPoolExecutor) -> None:
        self.file, self.threads = file, threads
        self.writing: Future[int] | None = None
        self.syncing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Queue bytes for writing. They must not change before the next call returns."""
        if self.writing is not None:
            self.writing.result()
        self.writing = self.threads.submit(self.file.write, data)
        if self.syncing is None or self.syncing.done():
            self.wait_for_disk()
            self.syncing = self.threads.submit(os.fsync, self.file.fileno())

    def wait_for_disk(self) -> None:
        """Wait for the running fsync, and raise its error.

        The system reports a failed write-back once only, so a later fsync of the file would succeed.
        """
        if self.syncing is not None:
            self.syncing.result()

    def wait(self) -> None:
        """Wait until everything is written, and raise any error of writing or syncing."""
        if self.writing is not None:
            self.writing.result()
        self.wait_for_disk()


@contextmanager
def background_writer(path: str | os.PathLike[str]) -> Generator[BackgroundWriter]:
    """Open a new file for writing in the background.

    Yields:
        The writer. When the block ends the file is complete, but not necessarily synced to disk.

    Raises:
        OSError: If the file cannot be written.
    """
    with Path(path).open("wb") as file, ThreadPoolExecutor(2) as threads:
        writer = BackgroundWriter(file, threads)
        yield writer
        writer.wait()
