"""Counts the bytes that Python code reads from files, as a measure of work that does not depend on the machine."""

import builtins
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class ReadCounter:
    """Bytes read so far from files opened for binary reading."""

    bytes: int = 0


@contextmanager
def count_bytes_read() -> Iterator[ReadCounter]:
    """Count the bytes that files opened in this block with mode "rb" get from the system, read-ahead included.

    Covers `open`, `io.open` and `pathlib`. Libraries that read in native code, such as SQLite, are not counted.
    """
    counter, open_file = ReadCounter(), io.open

    class CountedFile(io.FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            count = super().readinto(buffer)
            counter.bytes += count or 0
            return count

        def readall(self) -> bytes:
            data = super().readall()
            counter.bytes += len(data)
            return data

    def open_counted(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        return io.BufferedReader(CountedFile(file)) if mode == "rb" else open_file(file, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", open_counted)
        patch.setattr(builtins, "open", open_counted)
        yield counter
