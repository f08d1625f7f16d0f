"""Read and write packs: several adapters with shared factors in one file, of which each can be loaded separately.

A pack is a safetensors file with the metadata entry `lora_diffusion_pack`. Its tensors are:

    left.<module path>              (out, k)            shared left basis (see `algebra.reduce.shared_basis`)
    right.<module path>             (k, in * kernel)    shared right basis
    <i>.record                      (bytes,)            JSON with the metadata, error and core ranks of adapter i
    <i>.cores                       (n,)                concatenated cores of adapter i
    <i>.bias.<module path>          (out,)
    <i>.token.<component>.<name>    (vectors, width)    textual-inversion embeddings

The record of each adapter is a tensor and not metadata, because the header size is limited and the header is always
read in full.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lora_diffusion.adapters.adapter import AdapterMetadata, Token
from lora_diffusion.config.settings import Settings, format_validation_error
from lora_diffusion.core.dtypes import tensor_bytes
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.safetensors import map_safetensors, read_header, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.algebra.reduce.shared_basis import AdapterPack, Core, PackedAdapter, SharedModule

PACK_KEY = "lora_diffusion_pack"
"""Metadata key that marks a pack."""


class PackRecord(Settings):
    """The metadata entry of a pack."""

    names: tuple[str, ...]
    """Names of the adapters, in the order of their numbers."""
    shapes: Mapping[str, tuple[int, ...]]
    """Weight shape of each shared module, by module path."""


class PackedAdapterRecord(Settings):
    """The metadata of one adapter in a pack."""

    metadata: AdapterMetadata
    error: float
    """Relative error of the deltas (Frobenius norm)."""
    ranks: Mapping[str, int]
    """Rank of each core by module path, in the order of `<i>.cores`."""


def save_pack(pack: AdapterPack, path: str | os.PathLike[str]) -> None:
    """Save adapters with shared factors as a pack. The write is atomic.

    Raises:
        OutputError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for module_path, module in pack.modules.items():
        tensors |= {f"left.{module_path}": module.left, f"right.{module_path}": module.right}
    for number, packed in enumerate(pack.adapters.values()):
        tensors |= {f"{number}.{key}": tensor for key, tensor in _tensors_to_store(packed).items()}
    shapes = {module_path: module.shape for module_path, module in pack.modules.items()}
    record = PackRecord(names=tuple(pack.adapters), shapes=shapes)
    write_safetensors(path, tensors, {PACK_KEY: record.model_dump_json()})


def _tensors_to_store(packed: PackedAdapter) -> dict[str, Tensor]:
    """Return the tensors of one adapter, by key without its number."""
    import torch

    record = PackedAdapterRecord(metadata=packed.metadata, error=packed.error, ranks=packed.ranks)
    text = bytearray(record.model_dump_json().encode())
    tensors = {"record": torch.frombuffer(text, dtype=torch.uint8)}
    if packed.cores:
        cores = [packed.cores[path] for path in packed.ranks]
        tensors["cores"] = torch.cat([factor.flatten() for core in cores for factor in core.factors.values()])
    tensors |= {f"bias.{path}": bias for path, bias in packed.biases.items()}
    tensors |= {
        f"token.{component}.{name}": vectors
        for name, token in packed.tokens.items()
        for component, vectors in token.items()
    }
    return tensors


def check_not_pack(entries: Mapping[str, str], source: str) -> None:
    """Check that a file is not a pack.

    Args:
        entries: Metadata of the file.
        source: The path of the file, for error messages.

    Raises:
        AdapterFormatError: If it is a pack.
    """
    if PACK_KEY in entries:
        count = len(_read_pack_record(entries, source).names)
        raise AdapterFormatError(
            f"{source}: is a pack of {count} adapters with shared factors, not one adapter; "
            "extract them with `lora-diffusion library unpack`"
        )


def _read_pack_record(entries: Mapping[str, str], source: str) -> PackRecord:
    """Read the metadata entry of a pack. Raises AdapterFormatError if the file is not a pack."""
    if PACK_KEY not in entries:
        raise AdapterFormatError(
            f"{source}: is not a pack of adapters; expected a file made with `lora-diffusion library pack`"
        )
    try:
        return PackRecord.model_validate_json(entries[PACK_KEY])
    except ValidationError as error:
        reason = format_validation_error(error, PackRecord)
        raise AdapterFormatError(
            f"{source}: metadata entry {PACK_KEY!r} cannot be read ({reason}); the file is damaged"
        ) from None


def list_packed_adapters(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of the adapters in a pack, by reading only its header.

    Raises:
        AdapterFormatError: If the file is not a pack.
    """
    return _read_pack_record(read_header(path).metadata, os.fspath(path)).names


def load_pack(path: str | os.PathLike[str], names: Sequence[str] | None = None) -> AdapterPack:
    """Load adapters from a pack, with their tensors memory-mapped.

    Args:
        path: A file made with `save_pack`.
        names: The adapters to load; None loads all.

    Raises:
        AdapterFormatError: If the file is not a pack or is damaged.
        ConfigError: If a name is not in the pack.
    """
    from lora_diffusion.algebra.reduce.shared_basis import AdapterPack

    source = os.fspath(path)
    record = _read_pack_record(read_header(path).metadata, source)
    for name in names or ():
        if name not in record.names:
            closest = difflib.get_close_matches(name, record.names, n=1) or record.names[:1]
            raise ConfigError(
                f"{source}: none of its {len(record.names)} adapters is named {name!r}; did you mean {closest[0]!r}?"
            )
    tensors = map_safetensors(path)
    modules = {module_path: _read_module(tensors, module_path, record, source) for module_path in record.shapes}
    tensors_by_number: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(len(record.names))}
    for key, tensor in tensors.items():
        number, _, inner = key.partition(".")
        if number in tensors_by_number:
            tensors_by_number[number][inner] = tensor
    adapters = {
        name: _read_packed(tensors_by_number[str(number)], modules, f"{source}: {name}")
        for number, name in enumerate(record.names)
        if names is None or name in names
    }
    return AdapterPack(modules=modules, adapters=adapters)


def _read_module(tensors: Mapping[str, Tensor], module_path: str, record: PackRecord, source: str) -> SharedModule:
    """Read the shared bases of a module. Raises AdapterFormatError if they are missing or do not fit its weight."""
    from lora_diffusion.algebra.reduce.shared_basis import SharedModule

    out, *inner = record.shapes[module_path]
    left, right = tensors.get(f"left.{module_path}"), tensors.get(f"right.{module_path}")
    fits = left is not None and left.ndim == 2 and left.shape[0] == out
    fits = fits and right is not None and right.ndim == 2 and right.shape[1] == math.prod(inner)
    if left is None or right is None or not fits:
        raise AdapterFormatError(f"{source}: has no shared factors that fit {module_path}; the file is damaged")
    return SharedModule(left=left, right=right, shape=(out, *inner))


def _read_packed(tensors: Mapping[str, Tensor], modules: Mapping[str, SharedModule], source: str) -> PackedAdapter:
    """Read one adapter from its tensors, by key without its number. Raises AdapterFormatError if it is damaged."""
    from lora_diffusion.algebra.reduce.shared_basis import PackedAdapter

    try:
        record = PackedAdapterRecord.model_validate_json(bytes(tensor_bytes(tensors["record"])))
        cores = dict(_read_cores(tensors["cores"], record.ranks, modules)) if record.ranks else {}
    except (ValidationError, KeyError, ValueError, RuntimeError):
        raise AdapterFormatError(f"{source}: the record and the cores do not match; the file is damaged") from None
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("token."):
            _, component, name = key.split(".", 2)
            tokens.setdefault(name, {})[component] = tensor
    return PackedAdapter(
        cores=cores,
        ranks=record.ranks,
        error=record.error,
        biases={key.removeprefix("bias."): tensor for key, tensor in tensors.items() if key.startswith("bias.")},
        tokens=dict[str, Token](tokens),
        metadata=record.metadata,
    )


def _read_cores(
    data: Tensor, ranks: Mapping[str, int], modules: Mapping[str, SharedModule]
) -> Iterator[tuple[str, Core]]:
    """Yield the cores by module path. Raises KeyError or RuntimeError if they do not match the ranks."""
    import torch

    from lora_diffusion.adapters.layers import FullLayer, LoRALayer
    from lora_diffusion.algebra.reduce.shared_basis import is_factored

    start = 0
    for path, rank in ranks.items():
        rows, columns = modules[path].left.shape[1], modules[path].right.shape[0]
        is_full = not is_factored(rank, (rows, columns))
        sizes = [rows * columns] if is_full else [rank * columns, rank * rows]
        first, *second = torch.split(data[start : start + sum(sizes)], sizes)
        start += sum(sizes)
        if is_full:
            yield path, FullLayer(diff=first.reshape(rows, columns))
        else:
            up = second[0].reshape(rows, rank)
            yield path, LoRALayer(down=first.reshape(rank, columns), up=up, alpha=float(rank))
