"""Files that are there in full or not at all: written beside, synced, renamed; and where the package keeps its own."""

import contextlib
import glob
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from lora_diffusion.errors import OutputError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes `path`'s place if the block ends well.

    Raises OutputError if the place cannot be written.
    """
    with scratch_folder(path) as folder:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; expected the path of a file to write")
        part = folder / path.name
        yield part
        sync_to_disk(part)
        part.replace(path)
        sync_to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; a folder that is there already must be empty.

    Raises OutputError if the place cannot be written, or if something is in it.
    """
    with scratch_folder(path) as folder:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path}: already there and not an empty folder; remove it or give another output")
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
def scratch_folder(path: Path) -> Iterator[Path]:
    """A scratch folder in `path`'s folder, removed afterwards, with the system's refusals turned into OutputError.

    Parent folders are made as needed and removed again if nothing came into them. A refusal that names a file
    elsewhere, such as one that is being read, is passed on.
    """
    scratch: Path | None = None
    absent: list[Path] = []
    try:
        absent = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        scratch = Path(tempfile.mkdtemp(prefix=f"{scratch_name(path)}{os.getpid()}-", dir=path.parent))
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


def scratch_name(path: Path) -> str:
    """How names of scratch folders for `path` begin on this machine; the process's number follows."""
    return f".{path.name[:40]}.{platform.node()}-"


def remove_abandoned(path: Path) -> None:
    """Remove the scratch folders for `path` of processes that were killed, as none of their own code could."""
    start = scratch_name(path)
    for folder in path.parent.glob(f"{glob.escape(start)}*"):
        process = folder.name.removeprefix(start).partition("-")[0]
        if process.isdigit() and not is_running(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_to_disk(path: Path) -> None:
    """Ask the system to put a file's or folder's bytes on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Raise OutputError now, rather than after an hour's work, if nothing can be written at `path`."""
    with scratch_folder(path):
        pass


def check_output(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Raise OutputError unless an adapter can be written there: it is no input, and is free or may be replaced."""
    if output.suffix != ".safetensors":
        raise OutputError(f"{output}: expected a file to write that ends in .safetensors")
    files = [file for path in inputs if path.exists() for file in (path, *path.glob("*.safetensors"))]
    if output.exists() and any(output.samefile(file) for file in files):
        raise OutputError(f"{output}: is one of the inputs; give another output")
    if output.exists() and not force:
        raise OutputError(f"{output}: already there; give another output, or --force to replace it")
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
        return _hash_file(path, start)
    status = path.stat()
    return _hash_unchanged_file(path, start, status.st_size, status.st_mtime_ns)


@cache
def _hash_unchanged_file(path: Path, start: int, size: int, modified_ns: int) -> str:  # noqa: ARG001 (part of the cache key)
    return _hash_file(path, start)


def _hash_file(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_data_folder() -> Path:
    """Where the embedded base and its adapters lie: inside an installed package, or at the checkout's top."""
    inside = Path(__file__).parents[1] / "sample_data"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "sample_data"


def count_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a PEFT folder."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)
