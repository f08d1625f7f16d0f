"""Packing of adapter files into one file with shared bases, and unpacking."""

from __future__ import annotations

import os
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
    """A pack that was written."""

    output: Path
    """The pack."""
    rank: int
    """Rank of the shared bases."""
    bytes_before: int
    """Size of all adapter files together."""
    bytes_after: int
    """Size of the pack."""
    errors: Mapping[str, float]
    """Relative error of the deltas by name of the adapter, rounding included."""


@dataclass(frozen=True, kw_only=True)
class UnpackResult:
    """Adapter files that were written from a pack."""

    pack: Path
    """The pack."""
    files: Mapping[str, Path]
    """The written files, by name of the adapter."""
    bytes_before: int
    """Size of the whole pack."""
    bytes_after: int
    """Size of all written files together."""
    errors: Mapping[str, float]
    """Relative error of the deltas compared with the adapters that were packed, by name of the adapter."""


def pack_files(
    sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], config: PackConfig
) -> PackResult:
    """Pack adapter files into one file with shared bases. All adapters are in memory at the same time.

    Args:
        sources: Adapter files, and folders whose adapters are packed, subfolders included. The name of an adapter in
            the pack is the name of its file without the suffix.
        output: The .safetensors file to write.
        config: Settings. With the dtype `keep`, the pack has the type of the adapters if they agree, else float32.

    Raises:
        OutputError: If `output` is an input, exists without `config.force`, or cannot be written.
        ConfigError: If there are no adapters, two have the same name, or one has a kind that cannot share bases.
        FamilyMismatchError: If the adapters are for different families.
        AdapterFormatError: If a file cannot be read.
    """
    output = Path(output)
    files = _name_files([Path(source) for source in sources])
    check_output(output, files.values(), force=config.force)
    adapters = {name: load_adapter(path) for name, path in tqdm(files.items(), unit="file", disable=len(files) < 20)}
    family = share_bases(
        adapters, config.rank, _find_common_dtype(adapters) if config.dtype == "keep" else torch_dtype(config.dtype)
    )
    save_pack(family, output)
    return PackResult(
        output=output,
        rank=config.rank,
        bytes_before=sum(count_bytes(path) for path in files.values()),
        bytes_after=count_bytes(output),
        errors={name: part.error for name, part in family.adapters.items()},
    )


def _name_files(sources: Sequence[Path]) -> dict[str, Path]:
    """Return the adapter files sorted by name. Raise ConfigError if there are none, or two have the same name."""
    files: dict[str, Path] = {}
    for path in (file for source in sources for file in _list_adapter_files(source)):
        name = adapter_stem(path)
        if name in files:
            raise ConfigError(f"{files[name]} and {path} are both named {name!r}; rename one of the files")
        files[name] = path
    if not files:
        raise ConfigError(f"no adapters in {', '.join(map(str, sources))}; give adapter files, or a folder of them")
    return dict(sorted(files.items()))


def _list_adapter_files(source: Path) -> Iterator[Path]:
    """Yield the file itself, or all adapters in a folder. Raise ConfigError if one cannot be read."""
    locations, problems = scan_folder(source) if source.is_dir() else ([], [])
    if problems:
        raise ConfigError(f"{source}: {problems[0].problem}")
    yield from (location.path for location in locations) if source.is_dir() else (source,)


def _find_common_dtype(adapters: Mapping[str, Adapter]) -> torch.dtype:
    """Return the type of all factors if they agree, else float32."""
    layers = (layer for adapter in adapters.values() for layer in adapter.layers.values())
    types = {factor.dtype for layer in layers for factor in layer.factors.values()}
    return types.pop() if len(types) == 1 else torch_dtype("float32")


def unpack_file(
    pack: str | os.PathLike[str], folder: str | os.PathLike[str], *, name: str = "", force: bool = False
) -> UnpackResult:
    """Write the adapters of a pack as native files.

    Each is a plain LoRA whose rank is the smaller one of its own rank and that of the pack.

    Args:
        pack: The pack.
        folder: Folder to write to.
        name: Name of the only adapter to unpack; the others are not read. Empty for all adapters.
        force: Whether existing files may be replaced.

    Raises:
        AdapterFormatError: If the file is not a pack.
        ConfigError: If the pack has no adapter with this name, or a name is not a valid file name.
        OutputError: If a file exists without `force`; no file is written then.
    """
    pack, folder = Path(pack), Path(folder)
    names = (name,) if name else list_packed_adapters(pack)
    family = load_pack(pack, names)
    files = {member: folder / f"{_check_file_name(member, pack)}.safetensors" for member in names}
    for path in files.values():
        if path.exists() and path.samefile(pack):
            raise OutputError(f"{path}: is the pack itself; choose another folder")
        check_output_free(path, force=force)
    for member, path in tqdm(files.items(), unit="file", disable=len(files) < 20):
        save_adapter(unpack_adapter(family, member), path)
    return UnpackResult(
        pack=pack,
        files=files,
        bytes_before=count_bytes(pack),
        bytes_after=sum(count_bytes(path) for path in files.values()),
        errors={member: family.adapters[member].error for member in names},
    )


def _check_file_name(name: str, pack: Path) -> str:
    """Return the name if it is a file name. Raise ConfigError if it would be a path to another folder."""
    if name in ("", ".", "..") or any(letter in "/\\\0" for letter in name):
        raise ConfigError(
            f"{pack}: contains an adapter named {name!r}, which is not a valid file name; use a pack written by "
            "`lora-diffusion library pack`"
        )
    return name


def pack_to_json(result: PackResult) -> dict[str, Any]:
    """Return the result of packing as plain values, ready for JSON."""
    return {
        "to": str(result.output),
        "adapters": len(result.errors),
        "rank": result.rank,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        **_errors_to_json(result.errors),
    }


def unpack_to_json(result: UnpackResult) -> dict[str, Any]:
    """Return the result of unpacking as plain values, ready for JSON."""
    return {
        "from": str(result.pack),
        "files": {name: str(path) for name, path in result.files.items()},
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        **_errors_to_json(result.errors),
    }


def _errors_to_json(errors: Mapping[str, float]) -> dict[str, Any]:
    worst = max(errors, key=lambda name: errors[name])
    summary = {"worst": {worst: errors[worst]}, "median": median(errors.values())}
    return {"error": summary, "errors": dict(errors)}


def describe_pack(result: PackResult) -> str:
    """Format the result of packing as lines of text."""
    share = result.bytes_after / result.bytes_before
    count = f"{len(result.errors)} adapters at rank {result.rank}"
    sizes = f"{result.bytes_before:,} bytes before, {result.bytes_after:,} after ({share:.1%})"
    return f"{result.output}: {count}; {sizes}\n{_describe_errors(result.errors)}"


def describe_unpack(result: UnpackResult) -> str:
    """Format the result of unpacking as lines of text."""
    sizes = f"{result.bytes_before:,} bytes in the pack, {result.bytes_after:,} unpacked"
    listed = list(map(str, result.files.values())) if len(result.files) == 1 else [f"{len(result.files)} files"]
    return f"{result.pack}: {listed[0]}; {sizes}\n{_describe_errors(result.errors)}"


def _describe_errors(errors: Mapping[str, float]) -> str:
    worst = max(errors, key=lambda name: errors[name])
    return f"error of the deltas: median {median(errors.values()):.3g}, worst {errors[worst]:.3g} ({worst})"
