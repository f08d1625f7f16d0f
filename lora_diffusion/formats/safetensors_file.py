"""The safetensors container: read with its own library, written here.

Our own writer, because the library's puts header entries in random order (huggingface/safetensors#584), so that the
same content would not give the same bytes; and because it needs all tensors at once, where a merge holds one at a time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.files import whole_file
from lora_diffusion.precision import tensor_bytes

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}
TensorKind = tuple[torch.dtype, tuple[int, ...]]


def tensor_kinds(path: Path) -> dict[str, TensorKind]:
    """Type and shape of every tensor, from the header alone. Raises AdapterFormatError."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return {key: (DTYPES_BY_NAME[s.get_dtype()], tuple(s.get_shape())) for key, s in slices.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise AdapterFormatError(f"{path}: cannot be read as safetensors ({error}); the file is damaged") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata. Raises AdapterFormatError if the file is not safetensors."""
    if path.is_dir():
        raise AdapterFormatError(f"{path}: is a folder; give the path of a .safetensors adapter")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise AdapterFormatError(f"{path}: no such file; give the path of a .safetensors adapter") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterFormatError(
            f"{path}: not a safetensors file ({error}); expected an adapter saved as .safetensors"
        ) from None


def payload_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the bytes after the header, as ModelSpec's `hash_sha256` wants it."""
    digest = hashlib.sha256()
    for key in storage_order({k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}):
        digest.update(tensor_bytes(tensors[key]))
    return digest.hexdigest()


def storage_order(kinds: Mapping[str, TensorKind]) -> list[str]:
    """Wide types first, so that every tensor stays aligned; then by name."""
    return sorted(kinds, key=lambda key: (-kinds[key][0].itemsize, key))


def header_bytes(kinds: Mapping[str, TensorKind], metadata: Mapping[str, str]) -> bytes:
    """Length-prefixed JSON header, keys in a fixed order, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for key in storage_order(kinds):
        dtype, shape = kinds[key]
        size = dtype.itemsize * torch.Size(shape).numel()
        header[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stream_safetensors(
    file: BinaryIO,
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
        if (value.dtype, tuple(value.shape)) != kinds[key]:
            raise ValueError(f"{key}: {value.dtype} {tuple(value.shape)} where the header says {kinds[key]}")
        file.write(tensor_bytes(value))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, the same bytes for the same content, whole or not at all. Raises OutputError."""
    kinds = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    with whole_file(path) as part, part.open("wb") as file:
        stream_safetensors(file, kinds, metadata, lambda key: tensors[key])
