"""The safetensors container: read and written here, strictly and in bounded memory.

The reader is our own so that a damaged or hostile file ends in one typed error that names the key, and so that a header
can be looked at without its tensors; the writer, because the library's puts header entries in random order
(huggingface/safetensors#584), so that the same content would not give the same bytes, and because it needs all tensors
at once, where a merge holds one at a time. Format: [github.com/huggingface/safetensors].
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

from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.core.dtypes import dtype_name, tensor_bytes, torch_dtype
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.meta_tensor import MetaTensor

if TYPE_CHECKING:
    from torch import Tensor

DTYPES_BY_NAME = {
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
"""The format's types: torch's name, and bytes of one value."""
NAMES = {dtype: name for name, (dtype, _) in DTYPES_BY_NAME.items()}
ITEM_BYTES = dict(DTYPES_BY_NAME.values())
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
"""How a single number lies in the file, for `struct`."""
TensorKind = tuple[str, tuple[int, ...]]
"""Type, as torch spells it, and shape."""

MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where a tensor lies: type, shape, and first and last byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself, checked against its length."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    data_bytes: int


def read_header(path: Path) -> Header:
    """The checked header of a file; reads nothing else.

    Raises AdapterFormatError for anything but a whole, consistent safetensors file.
    """
    with open_file(path) as file:
        return parse_file_header(file, path)


def open_file(path: Path) -> BinaryIO:
    """The file, ready to be read. Raises AdapterFormatError."""
    if path.is_dir():
        raise AdapterFormatError(f"{path}: is a folder; give the path of a .safetensors adapter")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise AdapterFormatError(f"{path}: no such file; give the path of a .safetensors adapter") from None
    except OSError as error:
        raise AdapterFormatError(f"{path}: cannot be read ({error.strerror}); expected a .safetensors file") from None


def parse_file_header(file: BinaryIO, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8:
        raise not_safetensors(path, f"it has {size} bytes")
    if 8 + length > size:
        raise not_safetensors(path, f"its header should have {length:,} bytes, the file has {size:,}")
    if length > MOST_HEADER_BYTES:
        raise not_safetensors(path, f"its header of {length:,} bytes is beyond the format's {MOST_HEADER_BYTES:,}")
    table = parse_json(file.read(length), path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise not_safetensors(path, "its __metadata__ is no table of texts")
    slots = {key: parse_entry(key, entry, path) for key, entry in table.items()}
    check_layout(slots, size - 8 - length, path)
    return Header(tensors=slots, metadata=metadata, data_start=8 + length, data_bytes=size - 8 - length)


def not_safetensors(path: Path, reason: str) -> AdapterFormatError:
    return AdapterFormatError(f"{path}: not a safetensors file ({reason}); expected a file saved as .safetensors")


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The header's JSON object; a key that is there twice is refused, because readers would disagree on it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in table if keys.count(key) > 1)
            raise not_safetensors(path, f"its header has the key {twice!r} twice")
        return table

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except AdapterFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise not_safetensors(path, f"its header is no JSON: {str(error)[:80]}") from None
    if not isinstance(table, dict):
        raise not_safetensors(path, "its header is no JSON object")
    return table


def parse_entry(key: str, entry: Any, path: Path) -> TensorInfo:
    """One tensor's entry. Raises AdapterFormatError that names the key."""
    try:
        name, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise not_safetensors(path, f"{key!r} has no dtype, shape and data_offsets") from None
    if not isinstance(name, str) or name not in DTYPES_BY_NAME:
        raise not_safetensors(path, f"{key!r} is of the unknown type {name!r}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(is_size(side) for side in (*shape, start, end)):
        raise not_safetensors(path, f"{key!r} has a shape or offsets that are no sizes")
    dtype, item_bytes = DTYPES_BY_NAME[name]
    if end - start != math.prod(shape) * item_bytes:
        raise not_safetensors(path, f"{key!r} of shape {shape} does not fill its {end - start} bytes")
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=start, end=end)


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def check_layout(slots: Mapping[str, TensorInfo], data_bytes: int, path: Path) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    reached = 0
    for key, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)):
        if slot.end > data_bytes:
            raise not_safetensors(path, f"{key!r} ends {slot.end - data_bytes:,} bytes after the file; it is cut short")
        if slot.start != reached:
            word = "overlaps the tensor before it" if slot.start < reached else "leaves a gap before it"
            raise not_safetensors(path, f"{key!r} {word}")
        reached = slot.end
    if reached != data_bytes:
        raise not_safetensors(path, f"{data_bytes - reached:,} bytes after its last tensor belong to none")


def tensor_kinds(path: Path) -> dict[str, TensorKind]:
    """Type and shape of every tensor, from the header alone. Raises AdapterFormatError."""
    return {key: (slot.dtype, slot.shape) for key, slot in read_header(path).tensors.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata, read in one piece. Raises AdapterFormatError if the file is not safetensors."""
    import torch

    with open_file(path) as file:
        header = parse_file_header(file, path)
        data = torch.empty(header.data_bytes, dtype=torch.uint8)
        if cast(Any, file).readinto(data.numpy()) != header.data_bytes:
            raise not_safetensors(path, "it became shorter while it was read")
    return {key: view_tensor(data, slot) for key, slot in header.tensors.items()}, dict(header.metadata)


def read_tensor(path: Path, slot: TensorInfo, data_start: int) -> Tensor:
    """One tensor, read from its place in the file into memory of its own. Raises AdapterFormatError."""
    import torch

    data = torch.empty(slot.end - slot.start, dtype=torch.uint8)
    with open_file(path) as file:
        file.seek(data_start + slot.start)
        if cast(Any, file).readinto(data.numpy()) != slot.end - slot.start:
            raise not_safetensors(path, "it became shorter while it was read")
    return data.view(torch_dtype(slot.dtype)).reshape(slot.shape)


def view_tensor(data: Tensor, slot: TensorInfo) -> Tensor:
    """A tensor as a part of the file's bytes; copied only where those do not lie as its type needs."""
    part = data[slot.start : slot.end]
    if slot.start % ITEM_BYTES[slot.dtype]:
        part = part.clone()
    return part.view(torch_dtype(slot.dtype)).reshape(slot.shape)


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors as the file's own pages, which the system reads when they are looked at and drops when it must.

    Raises AdapterFormatError if the file is not safetensors.
    """
    import torch

    header = read_header(path)
    size = header.data_start + header.data_bytes
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[header.data_start :]
    return {key: view_tensor(data, slot) for key, slot in header.tensors.items()}


def read_meta_tensors(path: Path) -> tuple[dict[str, MetaTensor], dict[str, str]]:
    """The same without the numbers, but for single ones, such as a layer's alpha. Does not import torch."""
    with open_file(path) as file:
        header = parse_file_header(file, path)
        tensors = {key: read_meta_tensor(file, header, slot) for key, slot in header.tensors.items()}
    return tensors, dict(header.metadata)


def read_meta_tensor(file: BinaryIO, header: Header, slot: TensorInfo) -> MetaTensor:
    plain = MetaTensor(shape=slot.shape, dtype=slot.dtype)
    if plain.numel() != 1:
        return plain
    file.seek(header.data_start + slot.start)
    data = file.read(slot.end - slot.start)
    if slot.dtype == "bfloat16":
        return replace(plain, value=struct.unpack("<f", b"\0\0" + data)[0])
    code = SCALARS.get(NAMES[slot.dtype])
    return replace(plain, value=float(struct.unpack(code, data)[0])) if code else plain


def tensor_type(tensor: Tensor) -> TensorKind:
    return dtype_name(tensor.dtype), tuple(tensor.shape)


def payload_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the bytes after the header, as ModelSpec's `hash_sha256` wants it."""
    digest = hashlib.sha256()
    for key in storage_order({key: tensor_type(tensor) for key, tensor in tensors.items()}):
        digest.update(tensor_bytes(tensors[key]))
    return digest.hexdigest()


def file_payload_hash(path: Path) -> str:
    """The same of a file as it lies there, by which A1111 and kohya's scripts know it. Raises AdapterFormatError."""
    start = read_header(path).data_start
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def storage_order(kinds: Mapping[str, TensorKind]) -> list[str]:
    """Wide types first, so that every tensor stays aligned; then by name."""
    return sorted(kinds, key=lambda key: (-ITEM_BYTES[kinds[key][0]], key))


def header_bytes(kinds: Mapping[str, TensorKind], metadata: Mapping[str, str]) -> bytes:
    """Length-prefixed JSON header, keys in a fixed order, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key in storage_order(kinds):
        dtype, shape = kinds[key]
        size = ITEM_BYTES[dtype] * math.prod(shape)
        header[key] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Sink(Protocol):
    """What bytes can be written to, one after another."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def stream_safetensors(
    file: Sink,
    kinds: Mapping[str, TensorKind],
    metadata: Mapping[str, str],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a file whose tensors are asked for one at a time, in storage order.

    Raises ValueError if a tensor is not of the announced type and shape.
    """
    file.write(header_bytes(kinds, metadata))
    for key in storage_order(kinds):
        value = tensor(key)
        if tensor_type(value) != kinds[key]:
            raise ValueError(f"{key}: {value.dtype} {tuple(value.shape)} where the header says {kinds[key]}")
        file.write(tensor_bytes(value))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, the same bytes for the same content, whole or not at all. Raises OutputError."""
    kinds = {key: tensor_type(value) for key, value in tensors.items()}
    with atomic_file(path) as part, part.open("wb") as file:
        stream_safetensors(file, kinds, metadata, lambda key: tensors[key])
