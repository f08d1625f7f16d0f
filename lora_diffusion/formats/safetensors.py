"""Read and write safetensors files, with strict validation and bounded memory.

File format: 8 bytes with the header length (little endian), a JSON header with the type, shape and byte range of each
tensor, then the tensor bytes [github.com/huggingface/safetensors].

This module replaces the reader of the `safetensors` library so that a damaged or hostile file raises one
`AdapterFormatError` that names the key, and so that headers can be read without importing torch. It replaces the
writer because the library orders header entries at random (huggingface/safetensors#584), so that equal content does
not give equal bytes, and because the library needs all tensors in memory at once, while a merge holds one at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from lora_diffusion.core.atomic_files import atomic_file, file_hash, whole_and_tail_hash
from lora_diffusion.core.dtypes import dtype_name, tensor_bytes, torch_dtype
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.json_values import is_array, is_object
from lora_diffusion.formats.meta_tensor import MetaTensor

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES_BY_NAME = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Data types of the format, with the torch name and the number of bytes per value."""
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES_BY_NAME.items()}
ITEM_BYTES = dict(_DTYPES_BY_NAME.values())
"""Bytes per value, by torch dtype name (`float16`)."""
_STRUCT_CODES = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
"""`struct` format of one value, by safetensors type. BF16 has none and is handled separately."""
TensorKind = tuple[str, tuple[int, ...]]
"""The dtype (torch name, such as `float16`) and shape of a tensor."""

_MAX_HEADER_BYTES = 100_000_000
"""Header size limit of the safetensors specification."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """The type, shape and byte range of one tensor in a file."""

    dtype: str
    """torch dtype name, such as `float16`."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte, counted from the end of the header."""
    end: int
    """Offset after the last byte, counted from the end of the header."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The validated header of a safetensors file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    """The `__metadata__` entries."""
    data_start: int
    """Offset in the file at which the tensor data starts, in bytes."""
    data_bytes: int
    """Size of the tensor data, in bytes."""


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and validate the header of a safetensors file, without its tensors.

    Raises:
        AdapterFormatError: If the file is missing, truncated, inconsistent, or not a safetensors file.
    """
    path = Path(path)
    with _open_file(path) as file:
        return _parse_file_header(file, path)


def _open_file(path: Path) -> BinaryIO:
    """Open a file for reading. Raises AdapterFormatError if that fails."""
    if path.is_dir():
        raise AdapterFormatError(f"{path}: is a folder; give the path of a .safetensors file")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise AdapterFormatError(f"{path}: no such file; give the path of a .safetensors file") from None
    except OSError as error:
        raise AdapterFormatError(f"{path}: cannot be read ({error.strerror}); expected a .safetensors file") from None


def _parse_file_header(file: BinaryIO, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise _not_safetensors(path, f"it has only {size} bytes")
    if 8 + length > size:
        raise _not_safetensors(path, f"the header length is {length:,} bytes, but the file has only {size:,}")
    if length > _MAX_HEADER_BYTES:
        raise _not_safetensors(
            path, f"the header length of {length:,} bytes exceeds the limit of {_MAX_HEADER_BYTES:,}"
        )
    entries = _parse_json(file.read(length), path)
    metadata = entries.pop("__metadata__", {})
    if not is_object(metadata) or not all(isinstance(value, str) for value in metadata.values()):
        raise _not_safetensors(path, "__metadata__ is not an object with string values")
    tensors = {key: _parse_entry(key, entry, path) for key, entry in entries.items()}
    _check_layout(tensors, size - 8 - length, path)
    return Header(tensors=tensors, metadata=metadata, data_start=8 + length, data_bytes=size - 8 - length)


def _not_safetensors(path: Path, reason: str) -> AdapterFormatError:
    return AdapterFormatError(f"{path}: not a safetensors file ({reason}); expected a file saved as .safetensors")


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parse the header as a JSON object; refuse duplicate keys, because readers disagree on which one counts."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            keys = [key for key, _ in pairs]
            duplicate = next(key for key in entries if keys.count(key) > 1)
            raise _not_safetensors(path, f"the header has duplicate key {duplicate!r}")
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except AdapterFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(path, f"the header is not valid JSON: {str(error)[:80]}") from None
    if not is_object(entries):
        raise _not_safetensors(path, "the header is not a JSON object")
    return entries


def _parse_entry(key: str, entry: Any, path: Path) -> TensorInfo:
    """Parse the header entry of one tensor. Raises AdapterFormatError that names the key."""
    try:
        name, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _not_safetensors(path, f"{key!r} has no dtype, shape and data_offsets") from None
    if not isinstance(name, str) or name not in _DTYPES_BY_NAME:
        raise _not_safetensors(path, f"{key!r} has unknown dtype {name!r}")
    if not is_array(shape) or len(shape) > 64 or not all(_is_size(size) for size in (*shape, start, end)):
        raise _not_safetensors(path, f"{key!r} has an invalid shape or data_offsets; expected non-negative integers")
    dtype, item_bytes = _DTYPES_BY_NAME[name]
    if end - start != math.prod(shape) * item_bytes:
        raise _not_safetensors(path, f"{key!r} of shape {shape} and dtype {name} does not take {end - start} bytes")
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=start, end=end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int, path: Path) -> None:
    """Check that every byte after the header belongs to exactly one tensor."""
    offset = 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end > data_bytes:
            excess = info.end - data_bytes
            raise _not_safetensors(path, f"{key!r} ends {excess:,} bytes past the end of the file, which is truncated")
        if info.start != offset:
            problem = "overlaps the tensor before it" if info.start < offset else "leaves a gap before it"
            raise _not_safetensors(path, f"{key!r} {problem}")
        offset = info.end
    if offset != data_bytes:
        raise _not_safetensors(path, f"{data_bytes - offset:,} bytes after the last tensor are unused")


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file.

    The tensors are views of one buffer, which is read at once.

    Raises:
        AdapterFormatError: If the file is missing, damaged, or not a safetensors file.
    """
    import torch

    path = Path(path)
    with _open_file(path) as file:
        header = _parse_file_header(file, path)
        data = torch.empty(header.data_bytes, dtype=torch.uint8)
        if cast(Any, file).readinto(data.numpy()) != header.data_bytes:
            raise _not_safetensors(path, "it was truncated while it was being read")
    return {key: _view_tensor(data, info) for key, info in header.tensors.items()}, dict(header.metadata)


def read_tensor(path: str | os.PathLike[str], info: TensorInfo, data_start: int) -> Tensor:
    """Read a single tensor into a buffer of its own.

    Args:
        path: The safetensors file.
        info: The header entry of the tensor.
        data_start: `Header.data_start` of the file.

    Raises:
        AdapterFormatError: If the file cannot be read or has been truncated.
    """
    import torch

    path = Path(path)
    data = torch.empty(info.end - info.start, dtype=torch.uint8)
    with _open_file(path) as file:
        file.seek(data_start + info.start)
        if cast(Any, file).readinto(data.numpy()) != info.end - info.start:
            raise _not_safetensors(path, "it was truncated while it was being read")
    return data.view(torch_dtype(info.dtype)).reshape(info.shape)


def _view_tensor(data: Tensor, info: TensorInfo) -> Tensor:
    """Return one tensor as a view of the file's bytes; copy only if the bytes are not aligned to its dtype."""
    raw = data[info.start : info.end]
    if info.start % ITEM_BYTES[info.dtype]:
        raw = raw.clone()
    return raw.view(torch_dtype(info.dtype)).reshape(info.shape)


def map_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Map all tensors of a safetensors file into memory, so that the system loads pages on first access.

    Raises:
        AdapterFormatError: If the file is missing, damaged, or not a safetensors file.
    """
    import torch

    header = read_header(path)
    size = header.data_start + header.data_bytes
    data = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)[header.data_start :]
    return {key: _view_tensor(data, info) for key, info in header.tensors.items()}


def read_meta_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, MetaTensor], dict[str, str]]:
    """Read the shape and dtype of all tensors and the metadata of a safetensors file, without importing torch.

    Values are read only for tensors with one element, such as the alpha of a layer.

    Raises:
        AdapterFormatError: If the file is missing, damaged, or not a safetensors file.
    """
    path = Path(path)
    with _open_file(path) as file:
        header = _parse_file_header(file, path)
        tensors = {key: _read_meta_tensor(file, header, info) for key, info in header.tensors.items()}
    return tensors, dict(header.metadata)


def _read_meta_tensor(file: BinaryIO, header: Header, info: TensorInfo) -> MetaTensor:
    tensor = MetaTensor(shape=info.shape, dtype=info.dtype)
    if tensor.numel() != 1:
        return tensor
    file.seek(header.data_start + info.start)
    data = file.read(info.end - info.start)
    if info.dtype == "bfloat16":
        return replace(tensor, value=struct.unpack("<f", b"\0\0" + data)[0])
    code = _STRUCT_CODES.get(_NAMES[info.dtype])
    return replace(tensor, value=float(struct.unpack(code, data)[0])) if code else tensor


def _tensor_type(tensor: Tensor) -> TensorKind:
    return dtype_name(tensor.dtype), tuple(tensor.shape)


def payload_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensor data that these tensors give in a file, as a hexadecimal string.

    This is the hash that ModelSpec calls `hash_sha256` and kohya calls `sshs_model_hash`.
    """
    digest = hashlib.sha256()
    for key in _storage_order({key: _tensor_type(tensor) for key, tensor in tensors.items()}):
        digest.update(tensor_bytes(tensors[key]))
    return digest.hexdigest()


def file_payload_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes after the header, by which A1111 and kohya's scripts identify it.

    Raises:
        AdapterFormatError: If the file is not a safetensors file.
    """
    return file_hash(path, start=read_header(path).data_start, use_cache=False)


def file_and_payload_hash(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the SHA-256 of a whole file, and that of its bytes after the header, from one pass over the file.

    Raises:
        AdapterFormatError: If the file is not a safetensors file.
        OSError: If reading fails.
    """
    return whole_and_tail_hash(path, read_header(path).data_start)


def _storage_order(kinds: Mapping[str, TensorKind]) -> list[str]:
    """Sort keys by decreasing item size, so that every tensor is aligned, then by name."""
    return sorted(kinds, key=lambda key: (-ITEM_BYTES[kinds[key][0]], key))


def header_bytes(kinds: Mapping[str, TensorKind], metadata: Mapping[str, str]) -> bytes:
    """Return a file's header: length prefix and JSON with keys in a fixed order, padded to a multiple of 8 bytes.

    Args:
        kinds: The dtype and shape of each tensor.
        metadata: The `__metadata__` entries.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key in _storage_order(kinds):
        dtype, shape = kinds[key]
        size = ITEM_BYTES[dtype] * math.prod(shape)
        header[key] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Sink(Protocol):
    """Anything with a `write` method for bytes, such as an open file."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Write all of `data`."""
        ...


def stream_safetensors(
    file: Sink,
    kinds: Mapping[str, TensorKind],
    metadata: Mapping[str, str],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file one tensor at a time, so that only one has to be in memory.

    Args:
        file: Where to write.
        kinds: The dtype and shape of each tensor.
        metadata: The `__metadata__` entries.
        tensor: Returns the tensor of a key; called once per key, in storage order.

    Raises:
        ValueError: If a tensor does not have the dtype and shape in `kinds`.
    """
    file.write(header_bytes(kinds, metadata))
    for key in _storage_order(kinds):
        value = tensor(key)
        if _tensor_type(value) != kinds[key]:
            raise ValueError(f"{key}: is {value.dtype} {tuple(value.shape)}, but the header says {kinds[key]}")
        file.write(tensor_bytes(value))


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Equal tensors and metadata give equal bytes.

    Raises:
        OutputError: If the file cannot be written.
    """
    kinds = {key: _tensor_type(value) for key, value in tensors.items()}
    with atomic_file(Path(path)) as part, part.open("wb") as file:
        stream_safetensors(file, kinds, metadata, lambda key: tensors[key])
