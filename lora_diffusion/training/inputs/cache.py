"""What is encoded once: tensors kept under a key made of the content that they come from, so that none goes stale."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_diffusion.formats.safetensors import write_safetensors

Tensors = dict[str, Tensor]


def content_key(*parts: str) -> str:
    """SHA-256 over the parts and where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


class MemoryCache:
    """Keeps everything in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensors] = {}

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of a key, made if they are not there."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


class DiskCache:
    """Keeps each entry in a file, so that several runs and processes share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """The same. A file that cannot be read is made again. Raises OutputError if the folder cannot be written."""
        path = self.folder / f"{key}.safetensors"
        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError):
            made = make()
            write_safetensors(path, made, {})
            return made


class NoCache:
    """Makes everything anew."""

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:  # noqa: ARG002 (the others need it)
        return make()


Cache = MemoryCache | DiskCache | NoCache
