"""A pack: a family of adapters with shared factors in one file, from which one can be read without the others.

A safetensors file of our own layout, which a header entry `lora_diffusion_pack` names. Tensors:

    left.<module path>              (out, k)    the shared bases (see `algebra.reduce.shared_basis`)
    right.<module path>             (k, in * kernel)
    <i>.record                      (bytes,)    JSON: metadata, error and the rank of each core
    <i>.cores                       (n,)        the cores of adapter i, one after another
    <i>.bias.<module path>          (out,)
    <i>.token.<component>.<word>    (n, width)  learned words

The record of an adapter is a tensor because the container's header is limited, and is read whole whatever is wanted.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lora_diffusion.adapters.adapter import AdapterMetadata, Token
from lora_diffusion.config.settings import Settings, format_validation_error
from lora_diffusion.core.dtypes import tensor_bytes
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.safetensors import map_safetensors, read_header, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.algebra.reduce.shared_basis import Core, FamilyMember, SharedFamily, SharedModule

PACK_KEY = "lora_diffusion_pack"


class PackRecord(Settings):
    """The header entry of a pack."""

    names: tuple[str, ...]
    """Of the adapters, in the order of their numbers."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the weight of each shared module, by path."""


class MemberRecord(Settings):
    """What is known of one adapter of a pack."""

    metadata: AdapterMetadata
    error: float
    """Norm of what was lost of its deltas over their norm."""
    ranks: Mapping[str, int]
    """Of each core, by module path, in the order in which the cores lie."""


def save_pack(family: SharedFamily, path: Path) -> None:
    """Write a family, whole or not at all. Raises OutputError."""
    tensors: dict[str, Tensor] = {}
    for module_path, module in family.modules.items():
        tensors |= {f"left.{module_path}": module.left, f"right.{module_path}": module.right}
    for number, part in enumerate(family.members.values()):
        tensors |= {f"{number}.{key}": tensor for key, tensor in member_tensors(part).items()}
    shapes = {module_path: module.shape for module_path, module in family.modules.items()}
    record = PackRecord(names=tuple(family.members), shapes=shapes)
    write_safetensors(path, tensors, {PACK_KEY: record.model_dump_json()})


def member_tensors(part: FamilyMember) -> dict[str, Tensor]:
    """What one adapter adds to the file, under keys without its number."""
    import torch

    record = MemberRecord(metadata=part.metadata, error=part.error, ranks=part.ranks)
    text = bytearray(record.model_dump_json().encode())
    tensors = {"record": torch.frombuffer(text, dtype=torch.uint8)}
    if part.cores:
        cores = [part.cores[path] for path in part.ranks]
        tensors["cores"] = torch.cat([factor.flatten() for core in cores for factor in core.factors.values()])
    tensors |= {f"bias.{path}": bias for path, bias in part.biases.items()}
    words = {f"token.{c}.{word}": vectors for word, token in part.tokens.items() for c, vectors in token.items()}
    return tensors | words


def check_not_pack(entries: Mapping[str, str], source: str) -> None:
    """Raise AdapterFormatError if a file that is to be read as one adapter is a pack of several."""
    if PACK_KEY in entries:
        count = len(read_pack_record(entries, source).names)
        raise AdapterFormatError(
            f"{source}: is a pack of {count} adapters with shared factors, not one adapter; "
            "take them out of it with `lora-diffusion library unpack`"
        )


def read_pack_record(entries: Mapping[str, str], source: str) -> PackRecord:
    """The header entry of a pack. Raises AdapterFormatError for a file that is none."""
    if PACK_KEY not in entries:
        raise AdapterFormatError(f"{source}: is no pack of adapters; expected a file that `library pack` wrote")
    try:
        return PackRecord.model_validate_json(entries[PACK_KEY])
    except ValidationError as error:
        reason = format_validation_error(error, PackRecord)
        raise AdapterFormatError(f"{source}: header entry {PACK_KEY!r} cannot be read ({reason})") from None


def list_members(path: Path) -> tuple[str, ...]:
    """The adapters of a pack, from its header alone. Raises AdapterFormatError for a file that is no pack."""
    return read_pack_record(read_header(path).metadata, str(path)).names


def load_pack(path: Path, names: Sequence[str] | None = None) -> SharedFamily:
    """A pack, or those of its adapters that are named; its tensors are the file's own pages, read when looked at.

    Raises AdapterFormatError for a file that is no pack or is damaged, ConfigError for a name that is not in it.
    """
    from lora_diffusion.algebra.reduce.shared_basis import SharedFamily

    source = str(path)
    record = read_pack_record(read_header(path).metadata, source)
    for name in names or ():
        if name not in record.names:
            near = difflib.get_close_matches(name, record.names, n=1) or record.names[:1]
            raise ConfigError(f"{source}: none of its {len(record.names)} adapters is {name!r}; {near[0]!r} is one")
    tensors = map_safetensors(path)
    modules = {module_path: read_module(tensors, module_path, record, source) for module_path in record.shapes}
    owned: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(len(record.names))}
    for key, tensor in tensors.items():
        number, _, inner = key.partition(".")
        if number in owned:
            owned[number][inner] = tensor
    members = {
        name: read_member(owned[str(number)], modules, f"{source}: {name}")
        for number, name in enumerate(record.names)
        if names is None or name in names
    }
    return SharedFamily(modules=modules, members=members)


def read_module(tensors: Mapping[str, Tensor], module_path: str, record: PackRecord, source: str) -> SharedModule:
    """The bases of one module. Raises AdapterFormatError if they are missing or do not fit its weight."""
    from lora_diffusion.algebra.reduce.shared_basis import SharedModule

    out, *inner = record.shapes[module_path]
    left, right = tensors.get(f"left.{module_path}"), tensors.get(f"right.{module_path}")
    good = left is not None and left.ndim == 2 and left.shape[0] == out
    good = good and right is not None and right.ndim == 2 and right.shape[1] == math.prod(inner)
    if left is None or right is None or not good:
        raise AdapterFormatError(f"{source}: has no shared factors that fit {module_path}; the file is damaged")
    return SharedModule(left=left, right=right, shape=(out, *inner))


def read_member(tensors: Mapping[str, Tensor], modules: Mapping[str, SharedModule], source: str) -> FamilyMember:
    """One adapter of a pack, from its tensors without their number. Raises AdapterFormatError if it is damaged."""
    from lora_diffusion.algebra.reduce.shared_basis import FamilyMember

    try:
        record = MemberRecord.model_validate_json(bytes(tensor_bytes(tensors["record"])))
        cores = dict(read_cores(tensors["cores"], record.ranks, modules)) if record.ranks else {}
    except (ValidationError, KeyError, ValueError, RuntimeError):
        raise AdapterFormatError(f"{source}: its record and its cores do not fit; the file is damaged") from None
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("token."):
            _, component, word = key.split(".", 2)
            tokens.setdefault(word, {})[component] = tensor
    return FamilyMember(
        cores=cores,
        ranks=record.ranks,
        error=record.error,
        biases={key.removeprefix("bias."): tensor for key, tensor in tensors.items() if key.startswith("bias.")},
        tokens=dict[str, Token](tokens),
        metadata=record.metadata,
    )


def read_cores(
    flat: Tensor, ranks: Mapping[str, int], modules: Mapping[str, SharedModule]
) -> Iterator[tuple[str, Core]]:
    """The cores by module path. Raises KeyError or RuntimeError if they do not fit."""
    from lora_diffusion.adapters.layers import FullLayer, LoRALayer
    from lora_diffusion.algebra.reduce.shared_basis import is_factored

    start = 0
    for path, rank in ranks.items():
        rows, columns = modules[path].left.shape[1], modules[path].right.shape[0]
        whole = not is_factored(rank, (rows, columns))
        sizes = [rows * columns] if whole else [rank * columns, rank * rows]
        first, *second = flat[start : start + sum(sizes)].split(sizes)
        start += sum(sizes)
        if whole:
            yield path, FullLayer(diff=first.reshape(rows, columns))
        else:
            up = second[0].reshape(rows, rank)
            yield path, LoRALayer(down=first.reshape(rank, columns), up=up, alpha=float(rank))
