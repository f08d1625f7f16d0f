"""Atomic file output, output checks and file hashes.

A file or folder is written under a temporary name next to its destination, synced to disk and then renamed, so that it
is either complete or absent.
"""

import contextlib
import glob
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Generator, Iterable
from functools import cache
from pathlib import Path

from lora_diffusion.errors import OutputError

_HASH_CHUNK_BYTES = 2**20


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Generator[Path]:
    """Write a file atomically.

    Args:
        path: Destination. An existing file is replaced.

    Yields:
        A temporary path to write to. It is renamed to `path` when the block ends without an exception, and deleted
        otherwise.

    Raises:
        OutputError: If `path` is a folder or cannot be written.
    """
    path = Path(path)
    with _scratch_folder(path) as folder:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; expected the path of a file to write")
        part = folder / path.name
        yield part
        sync_to_disk(part)
        part.replace(path)
        sync_to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Generator[Path]:
    """Write a folder atomically.

    Args:
        path: Destination. It must not exist, or be an empty folder.

    Yields:
        A temporary folder to write to. It is renamed to `path` when the block ends without an exception, and deleted
        otherwise.

    Raises:
        OutputError: If `path` cannot be written, or exists and is not an empty folder.
    """
    path = Path(path)
    with _scratch_folder(path) as folder:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path}: already exists and is not an empty folder; remove it or choose another output")
        part = folder / path.name
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                sync_to_disk(file)
        if path.exists():
            path.rmdir()
        part.replace(path)
        sync_to_disk(path.parent)


@contextlib.contextmanager
def _scratch_folder(path: Path) -> Generator[Path]:
    """Create a temporary folder next to `path`, and remove it when the block ends.

    Missing parent folders are created, and removed again if they are still empty at the end. An OSError from inside
    the block becomes an OutputError, unless it names a file outside the folder of `path`, such as an input.
    """
    scratch: Path | None = None
    absent: list[Path] = []
    try:
        absent = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        scratch = Path(tempfile.mkdtemp(prefix=f"{_scratch_prefix(path)}{os.getpid()}-", dir=path.parent))
        yield scratch
    except OutputError:
        raise
    except OSError as error:
        elsewhere = error.filename is not None and not Path(error.filename).is_relative_to(path.parent)
        if scratch is not None and elsewhere:
            raise
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another output") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in absent:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _scratch_prefix(path: Path) -> str:
    """Return how the names of scratch folders for `path` begin on this machine; the process id follows."""
    return f".{path.name[:40]}.{platform.node()}-"


def _remove_abandoned(path: Path) -> None:
    """Remove scratch folders for `path` that killed processes of this machine left behind."""
    prefix = _scratch_prefix(path)
    for folder in path.parent.glob(f"{glob.escape(prefix)}*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_to_disk(path: str | os.PathLike[str]) -> None:
    """Flush a file or folder to disk with fsync."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written at `path`, before a long computation rather than after it.

    Raises:
        OutputError: If it cannot.
    """
    with _scratch_folder(Path(path)):
        pass


def check_output_free(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse to overwrite an output.

    Args:
        path: File or folder to write.
        force: Whether it may be replaced.

    Raises:
        OutputError: If `path` exists and `force` is not given.
    """
    if Path(path).exists() and not force:
        raise OutputError(f"{path}: already exists; choose another output, or replace it with --force")


def check_output(output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], *, force: bool) -> None:
    """Check that an adapter file can be written at `output`.

    Args:
        output: Path of the .safetensors file to write.
        inputs: Adapter files or PEFT folders that are read; none of them may be overwritten.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: If `output` does not end in .safetensors, is an input, exists without `force`, or is not writable.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: expected a file to write that ends in .safetensors")
    files = [file for path in map(Path, inputs) if path.exists() for file in (path, *path.glob("*.safetensors"))]
    if output.exists() and any(output.samefile(file) for file in files):
        raise OutputError(f"{output}: is one of the inputs; choose another output")
    check_output_free(output, force=force)
    check_writable(output)


def file_hash(path: str | os.PathLike[str], *, start: int = 0, use_cache: bool = True) -> str:
    """Return the SHA-256 of a file's bytes as a hexadecimal string.

    Args:
        path: The file.
        start: Offset of the first byte that counts.
        use_cache: Whether an earlier hash may be returned if the size and modification time are unchanged. Pass False
            to detect files that were modified or damaged without a new modification time.

    Raises:
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if not use_cache:
        return _hash_bytes(path, start)
    status = path.stat()
    return _hash_unchanged_file(path, start, status.st_size, status.st_mtime_ns)


@cache
def _hash_unchanged_file(path: Path, start: int, size: int, modified_ns: int) -> str:  # noqa: ARG001 (part of the cache key)
    return _hash_bytes(path, start)


def _hash_bytes(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def prefixed_file_hash(path: str | os.PathLike[str], prefix: bytes) -> str:
    """Return the SHA-256 of `prefix` followed by a file's bytes as a hexadecimal string.

    Raises:
        OSError: If the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(prefix)).hexdigest()


def whole_and_tail_hash(path: str | os.PathLike[str], start: int) -> tuple[str, str]:
    """Return the SHA-256 of a whole file, and that of its bytes from offset `start` on, from one pass over the file.

    Raises:
        OSError: If the file cannot be read.
    """
    with Path(path).open("rb") as file:
        whole, payload = hashlib.sha256(file.read(start)), hashlib.sha256()
        while chunk := file.read(_HASH_CHUNK_BYTES):
            whole.update(chunk)
            payload.update(chunk)
    return whole.hexdigest(), payload.hexdigest()


def sample_data_folder() -> Path:
    """Return the folder of the embedded base and its adapters, in the installed package or in the source checkout."""
    inside = Path(__file__).parents[1] / "sample_data"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "sample_data"


def count_bytes(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of a file, or of all files in a PEFT folder."""
    path = Path(path)
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)
