"""Adapter files into one pack with shared factors, and out of it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.algebra.reduce.shared_basis import share_bases, unpack_adapter
from lora_diffusion.config.adapter_files import PackConfig
from lora_diffusion.core.atomic_files import check_output, check_output_free, count_bytes
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.adapters.pack import list_packed_adapters, load_pack, save_pack
from lora_diffusion.library.entry import adapter_stem, scan_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """A written pack, and the files in it."""

    output: Path
    rank: int
    bytes_before: int
    bytes_after: int
    errors: Mapping[str, float]
    """Norm of what is lost of the deltas over their norm, by adapter; rounding included."""


@dataclass(frozen=True, kw_only=True)
class UnpackResult:
    """Files written from a pack."""

    pack: Path
    files: Mapping[str, Path]
    bytes_before: int
    """Of the whole pack."""
    bytes_after: int
    """Of all files together."""
    errors: Mapping[str, float]
    """How far each is from the adapter that was packed."""


def pack_files(sources: Sequence[Path], output: Path, how: PackConfig) -> PackResult:
    """Pack adapter files, and all adapters below folders, into one file.

    An adapter's name in the pack is its file's name without the suffix. `keep` as a type is the files' own if they
    agree, else float32. Memory is about the size of all files. Raises OutputError for an output that is there already,
    is an input, or cannot be written; ConfigError for no adapters, two of one name, or kinds that cannot share factors;
    FamilyMismatchError; AdapterFormatError for a file that cannot be read.
    """
    files = name_files(sources)
    check_output(output, files.values(), force=how.force)
    adapters = {name: load_adapter(path) for name, path in tqdm(files.items(), unit="file", disable=len(files) < 20)}
    family = share_bases(
        adapters, how.rank, find_common_dtype(adapters) if how.dtype == "keep" else torch_dtype(how.dtype)
    )
    save_pack(family, output)
    return PackResult(
        output=output,
        rank=how.rank,
        bytes_before=sum(count_bytes(path) for path in files.values()),
        bytes_after=count_bytes(output),
        errors={name: part.error for name, part in family.adapters.items()},
    )


def name_files(sources: Sequence[Path]) -> dict[str, Path]:
    """Return the adapters by name, sorted. Raises ConfigError for none, or for duplicate names."""
    files: dict[str, Path] = {}
    for path in (file for source in sources for file in list_adapter_files(source)):
        name = adapter_stem(path)
        if name in files:
            raise ConfigError(f"{files[name]} and {path} are both called {name!r}; give one of them another file name")
        files[name] = path
    if not files:
        raise ConfigError(f"no adapters in {', '.join(map(str, sources))}; give adapter files, or a folder of them")
    return dict(sorted(files.items()))


def list_adapter_files(source: Path) -> Iterator[Path]:
    """List the file itself, or all adapters below a folder. Raises ConfigError for unreadable entries."""
    places, refused = scan_folder(source) if source.is_dir() else ([], [])
    if refused:
        raise ConfigError(f"{source}: {refused[0].problem}")
    yield from (place.path for place in places) if source.is_dir() else (source,)


def find_common_dtype(adapters: Mapping[str, Adapter]) -> torch.dtype:
    """Return the common type of all factors, or float32 if there is none."""
    layers = (layer for adapter in adapters.values() for layer in adapter.layers.values())
    types = {factor.dtype for layer in layers for factor in layer.factors.values()}
    return types.pop() if len(types) == 1 else torch_dtype("float32")


def unpack_file(pack: Path, folder: Path, *, name: str = "", force: bool = False) -> UnpackResult:
    """Write the adapters of a pack, or the one of that name, as native files into a folder.

    Each is a plain LoRA of its own rank or, where that is less, of the pack's. One adapter is read without the others.
    Raises AdapterFormatError for a file that is no pack, ConfigError for a name that is not in it or is no file name,
    OutputError for a file that is there already; nothing is written then.
    """
    names = (name,) if name else list_packed_adapters(pack)
    family = load_pack(pack, names)
    files = {wanted: folder / f"{check_file_name(wanted, pack)}.safetensors" for wanted in names}
    for path in files.values():
        if path.exists() and path.samefile(pack):
            raise OutputError(f"{path}: is the pack itself; give another folder")
        check_output_free(path, force=force)
    for wanted, path in tqdm(files.items(), unit="file", disable=len(files) < 20):
        save_adapter(unpack_adapter(family, wanted), path)
    return UnpackResult(
        pack=pack,
        files=files,
        bytes_before=count_bytes(pack),
        bytes_after=sum(count_bytes(path) for path in files.values()),
        errors={wanted: family.adapters[wanted].error for wanted in names},
    )


def check_file_name(name: str, pack: Path) -> str:
    """Return the name if it is safe as a file name. Raises ConfigError for one that leads to another folder."""
    if name in ("", ".", "..") or any(letter in "/\\\0" for letter in name):
        raise ConfigError(f"{pack}: holds an adapter called {name!r}, which is no file name; the pack is not of ours")
    return name


def pack_to_json(done: PackResult) -> dict[str, Any]:
    """Return the result of packing as plain values, ready for JSON."""
    return {
        "to": str(done.output),
        "adapters": len(done.errors),
        "rank": done.rank,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        **errors_to_json(done.errors),
    }


def unpack_to_json(done: UnpackResult) -> dict[str, Any]:
    """Return the result of unpacking as plain values, ready for JSON."""
    return {
        "from": str(done.pack),
        "files": {name: str(path) for name, path in done.files.items()},
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        **errors_to_json(done.errors),
    }


def errors_to_json(errors: Mapping[str, float]) -> dict[str, Any]:
    worst = max(errors, key=lambda name: errors[name])
    found = {"worst": {worst: errors[worst]}, "median": median(errors.values())}
    return {"error": found, "errors": dict(errors)}


def describe_pack(done: PackResult) -> str:
    """Format the result of packing as lines of text."""
    share = done.bytes_after / done.bytes_before
    sizes = f"{done.bytes_before:,} bytes before, {done.bytes_after:,} after ({share:.1%})"
    return f"{done.output}: {len(done.errors)} adapters at rank {done.rank}; {sizes}\n{describe_errors(done.errors)}"


def describe_unpack(done: UnpackResult) -> str:
    """Format the result of unpacking as lines of text."""
    sizes = f"{done.bytes_before:,} bytes in the pack, {done.bytes_after:,} unpacked"
    listed = list(map(str, done.files.values())) if len(done.files) == 1 else [f"{len(done.files)} files"]
    return f"{done.pack}: {listed[0]}; {sizes}\n{describe_errors(done.errors)}"


def describe_errors(errors: Mapping[str, float]) -> str:
    worst = max(errors, key=lambda name: errors[name])
    return f"error of the deltas: median {median(errors.values()):.3g}, worst {errors[worst]:.3g} ({worst})"
