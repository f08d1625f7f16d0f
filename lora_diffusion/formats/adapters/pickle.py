"""Pickled files (`.pt`, `.bin`, `.ckpt`): only through torch's `weights_only`, which executes nothing."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters import cloneofsimo

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".bin", ".ckpt", ".pth")


def is_pickled(path: Path) -> bool:
    """Whether the name says so; a pickle under another name is refused for what it is not."""
    return path.suffix.lower() in SUFFIXES


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a pickled file. Raises AdapterFormatError for anything that is not plain tensors."""
    if not path.is_file():
        raise AdapterFormatError(f"{path}: no such file; give the path of an adapter")
    check_archive_size(path)
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's notes on how it was pickled
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise AdapterFormatError(
            f"{path}: would have to execute code to be read, or is no pickle; only plain tensors are read, "
            "convert it to .safetensors where you trust it"
        ) from None
    except Exception as error:  # noqa: BLE001 (whatever a hostile pickle provokes in the loader means the same)
        raise AdapterFormatError(f"{path}: cannot be read as a pickled file ({str(error)[:120]})") from None
    tensors = extract_tensors(content, path.stem)
    if not tensors:
        raise AdapterFormatError(f"{path}: holds no tensors by name; expected an adapter or a learned token")
    return tensors


def check_archive_size(path: Path) -> None:
    """Raise AdapterFormatError for an archive that unpacks to more than it has on disk: torch compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise AdapterFormatError(f"{path}: is a damaged archive ({error})") from None
    if unpacked > path.stat().st_size:
        raise AdapterFormatError(
            f"{path}: unpacks to {unpacked:,} bytes from {path.stat().st_size:,}; torch compresses nothing, "
            "so this file is not its work"
        )


def extract_tensors(content: object, stem: str) -> dict[str, Tensor]:
    """Tensors by key: a state dict, one inside `state_dict`, A1111's learned token, or a list of pairs."""
    import torch

    if isinstance(content, list | tuple):
        return cloneofsimo.tensors_from_list(content) or {}
    if not isinstance(content, dict):
        return {}
    inner = content.get("state_dict")
    if isinstance(inner, dict):
        return extract_tensors(inner, stem)
    learned = content.get("string_to_param")
    if isinstance(learned, dict):
        name = content.get("name")
        word = name if isinstance(name, str) and name else stem
        return {word if key == "*" else str(key): t for key, t in learned.items() if isinstance(t, torch.Tensor)}
    if not all(isinstance(key, str) for key in content):
        return {}
    return {key: value.detach() for key, value in content.items() if isinstance(value, torch.Tensor)}
