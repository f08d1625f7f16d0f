"""Read pickled files (`.pt`, `.bin`, `.ckpt`) with torch's `weights_only`, which does not execute code."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters import cloneofsimo

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".bin", ".ckpt", ".pth")
"""File suffixes of pickled files."""


def is_pickled(path: str | os.PathLike[str]) -> bool:
    """Return whether a file has the suffix of a pickled file."""
    return Path(path).suffix.lower() in SUFFIXES


def read_pickled(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a pickled file, without executing code from it.

    Returns:
        The tensors of a state dict, an A1111 embedding, or cloneofsimo's list of tensors, by key.

    Raises:
        AdapterFormatError: If the file is missing or damaged, or holds anything but plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFormatError(f"{path}: no such file; give the path of an adapter file")
    _check_archive_size(path)
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of torch about how the file was pickled
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise AdapterFormatError(
            f"{path}: is not a pickled file, or would execute code when loaded; expected plain tensors, "
            "convert the file to .safetensors if you trust it"
        ) from None
    except Exception as error:  # noqa: BLE001 (a hostile pickle can cause any exception in torch's loader)
        raise AdapterFormatError(f"{path}: cannot be read as a pickled file ({str(error)[:120]})") from None
    tensors = _extract_tensors(content, path.stem)
    if not tensors:
        raise AdapterFormatError(f"{path}: has no named tensors; expected an adapter or a textual-inversion embedding")
    return tensors


def _check_archive_size(path: Path) -> None:
    """Raise AdapterFormatError for a compressed archive (a zip bomb), because torch does not compress files."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise AdapterFormatError(f"{path}: is a damaged zip archive ({error})") from None
    if unpacked > path.stat().st_size:
        raise AdapterFormatError(
            f"{path}: is a compressed archive ({unpacked:,} bytes from {path.stat().st_size:,}); "
            "expected a file saved with torch.save, which does not compress"
        )


def _extract_tensors(content: object, stem: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict, a nested `state_dict`, an A1111 embedding, or a list of pairs, by key."""
    import torch

    if isinstance(content, list | tuple):
        return cloneofsimo.tensors_from_list(cast("Sequence[object]", content)) or {}
    if not _is_dict(content):
        return {}
    inner = content.get("state_dict")
    if _is_dict(inner):
        return _extract_tensors(inner, stem)
    embeddings = content.get("string_to_param")
    if _is_dict(embeddings):
        name = content.get("name")
        token = name if isinstance(name, str) and name else stem
        return {token if key == "*" else str(key): t for key, t in embeddings.items() if isinstance(t, torch.Tensor)}
    tensors = {key: value for key, value in content.items() if isinstance(key, str)}
    if len(tensors) < len(content):
        return {}
    return {key: value.detach() for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def _is_dict(value: object) -> TypeGuard[dict[object, object]]:
    return isinstance(value, dict)
