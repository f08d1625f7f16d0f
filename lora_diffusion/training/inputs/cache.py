"""Caches of encoded images and captions.

Keys are hashes of everything that the tensors depend on, so an entry is never out of date.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType] (safetensors' types)
from torch import Tensor

from lora_diffusion.formats.safetensors import write_safetensors

Tensors = dict[str, Tensor]
"""Tensors of one cache entry by name."""


def content_key(*parts: str) -> str:
    """Return the SHA-256 hash of several strings. Lengths are hashed too, so ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


class MemoryCache:
    """Cache in memory, without a size limit."""

    def __init__(self) -> None:
        self.entries: dict[str, Tensors] = {}

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """Return the tensors stored under a key; call `make` and store its result if there are none."""
        if key not in self.entries:
            self.entries[key] = make()
        return self.entries[key]


class DiskCache:
    """Cache on disk, one file per entry, which several runs and processes can share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """Return the tensors stored under a key; call `make` and store its result if there are none.

        A file that cannot be read counts as missing and is replaced.

        Raises:
            OutputError: If the folder cannot be written to.
        """
        path = self.folder / f"{key}.safetensors"
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError):
            tensors = make()
            write_safetensors(path, tensors, {})
            return tensors


class NoCache:
    """Stand-in for a cache that stores nothing."""

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:  # noqa: ARG002 (same signature as the other caches)
        """Call `make` and return its result."""
        return make()


Cache = MemoryCache | DiskCache | NoCache
"""Any of the caches."""
