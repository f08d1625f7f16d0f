"""Load adapter files of any format, detect their format, and check that every key was used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash
from lora_diffusion.architectures.detection import candidate_families, choose_family
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters import cloneofsimo, kohya, native, peft, textual_inversion, unsupported
from lora_diffusion.formats.adapters.metadata import Record, parse_foreign_metadata, read_record
from lora_diffusion.formats.adapters.pack import check_not_pack
from lora_diffusion.formats.adapters.parsed import ParsedFile, validate_adapter
from lora_diffusion.formats.adapters.pickle import is_pickled, read_pickled
from lora_diffusion.formats.json_values import is_object
from lora_diffusion.formats.safetensors import read_meta_tensors, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

Content: TypeAlias = "tuple[dict[str, Tensor], dict[str, str]]"
"""Tensors by key, and metadata entries of a file."""


@dataclass(frozen=True, kw_only=True)
class ReadMode:
    """The functions that read a file, either with all values or only shapes and dtypes."""

    file: Callable[[Path], Content]
    """Reads the tensors and metadata of a safetensors file."""
    token: Callable[[Mapping[str, Any]], Tensor]
    """Decodes a textual-inversion embedding in the metadata of a native file."""


FULL_FILE = ReadMode(file=read_safetensors, token=native.decode_token)
"""Read tensors with their values."""
HEADER_ONLY = ReadMode(file=cast("Callable[[Path], Content]", read_meta_tensors), token=native.token_meta)
"""Read only shapes and dtypes, as `MetaTensor`."""
FOLDER_FILE = "adapter_model.safetensors"
"""Weight file in a PEFT adapter folder."""
FOLDER_CONFIG = "adapter_config.json"
"""Configuration file in a PEFT adapter folder."""


def load_adapter(path: str | os.PathLike[str], *, ignore: Sequence[str] = ()) -> Adapter:
    """Load an adapter from a file in any supported format.

    Args:
        path: A .safetensors or pickled (.pt, .bin, .ckpt) file in native, PEFT, diffusers, kohya, LyCORIS or
            cloneofsimo format, a textual-inversion embedding, or an adapter folder that PEFT saved.
        ignore: Glob patterns of keys that are skipped if they are not recognized.

    Raises:
        AdapterFormatError: If the file is missing or damaged, holds NaN or infinity, is of an unsupported kind, or has
            keys that are not recognized.
    """
    path = Path(path)
    record, adapter = read_adapter(path, FULL_FILE, ignore)
    validate_adapter(adapter, str(path))
    if record and record.hash and record.hash != adapter_hash(adapter):
        raise AdapterFormatError(
            f"{path}: the tensors do not match the hash in the metadata; the file is damaged or was edited"
        )
    return adapter


def load_unchecked(path: str | os.PathLike[str], *, ignore: Sequence[str] = ()) -> Adapter:
    """Load an adapter for inspection, without the checks for NaN, infinity and edited tensors.

    Args:
        path: As in `load_adapter`.
        ignore: As in `load_adapter`.

    Raises:
        AdapterFormatError: As in `load_adapter`, except for these checks.
    """
    return read_adapter(path, FULL_FILE, ignore)[1]


def load_meta_adapter(path: str | os.PathLike[str], *, ignore: Sequence[str] = ()) -> Adapter:
    """Load an adapter from the header of its file: factors have a shape and dtype but no values.

    torch is not imported, except for a pickled file, which has no header and is loaded in full.

    Args:
        path: As in `load_adapter`.
        ignore: As in `load_adapter`.

    Raises:
        AdapterFormatError: As in `load_adapter`, except for checks of values.
    """
    return read_adapter(path, HEADER_ONLY, ignore)[1]


def read_adapter(path: str | os.PathLike[str], mode: ReadMode, ignore: Sequence[str]) -> tuple[Record | None, Adapter]:
    """Read an adapter and the record that this library writes to its own files.

    Args:
        path: As in `load_adapter`.
        mode: `FULL_FILE` or `HEADER_ONLY`, or a variant of them.
        ignore: As in `load_adapter`.

    Returns:
        The record, which is None for a file of another tool, and the adapter.

    Raises:
        AdapterFormatError: As in `load_adapter`, except for checks of values.
    """
    path = Path(path)
    source = str(path)
    config = _read_folder_config(path)
    file = path / FOLDER_FILE if path.is_dir() and config is not None else path
    tensors, entries = (read_pickled(file), {}) if is_pickled(file) else mode.file(file)
    check_not_pack(entries, source)
    record = read_record(entries, source)
    parsed = _parse_file(tensors, entries, source, config=config, alphas=record.alpha if record else None)
    _check_all_matched(parsed, tensors, ignore, source)
    metadata = _fill_metadata(
        record.metadata if record else parse_foreign_metadata(entries), parsed, path, has_record=record is not None
    )
    tokens = {**parsed.tokens, **native.read_tokens(entries, source, mode.token)}
    return record, Adapter(layers=parsed.layers, biases=parsed.biases, tokens=tokens, metadata=metadata)


def _read_folder_config(path: Path) -> dict[str, Any] | None:
    """Read the `adapter_config.json` of a PEFT folder, given the folder or its weight file; None for other files."""
    folder = path if path.is_dir() else path.parent
    config = folder / FOLDER_CONFIG
    if not config.is_file() or (path.is_file() and path.name != FOLDER_FILE):
        return None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{config}: cannot be read ({error}); expected a PEFT configuration as JSON") from None
    if not is_object(settings):
        raise AdapterFormatError(f"{config}: is not a JSON object; expected a PEFT configuration")
    kind = settings.get("peft_type", "LORA")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise AdapterFormatError(f"{config}: has the unsupported peft_type {kind!r}; expected LORA, LOHA or LOKR")
    return settings


def _parse_file(
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, str],
    source: str,
    *,
    config: Mapping[str, Any] | None,
    alphas: Mapping[str, float] | None,
) -> ParsedFile:
    """Detect the format by the keys and parse the tensors. Raises AdapterFormatError for an unsupported format."""
    keys = frozenset(tensors)
    _check_supported(unsupported.identify_model(keys), keys, source)
    if cloneofsimo.can_read(keys):
        return cloneofsimo.parse_tensors(tensors, entries, source)
    if kohya.can_read(keys):
        return kohya.parse_tensors(tensors, entries, source)
    if peft.can_read(keys):
        return peft.parse_tensors(tensors, entries, source, config=config, alphas=alphas)
    if textual_inversion.can_read(tensors):
        return textual_inversion.parse_tensors(tensors, source)
    if not keys and native.TOKENS_KEY in entries:
        return ParsedFile(dialect="native")
    _check_supported(unsupported.identify_kind(keys), keys, source)
    first = f"first: {min(keys)!r}" if keys else "it holds no tensors"
    raise AdapterFormatError(
        f"{source}: none of its {len(keys)} keys is in a known format ({first}); expected an adapter of PEFT, "
        "diffusers, kohya, LyCORIS or cloneofsimo, or a textual-inversion embedding"
    )


def _check_supported(name: str, keys: frozenset[str], source: str) -> None:
    if name:
        raise AdapterFormatError(f"{source}: is {name}, which is not supported (first key: {min(keys)!r})")


def _check_all_matched(parsed: ParsedFile, tensors: Mapping[str, Tensor], ignore: Sequence[str], source: str) -> None:
    """Raise AdapterFormatError for keys that are not recognized and match no pattern of `ignore`."""
    unmatched = [key for key in parsed.unmatched if not any(fnmatchcase(key, pattern) for pattern in ignore)]
    if unmatched:
        name = unsupported.identify_kind(unmatched)
        reason = f"they look like {name}" if name else "SD 1.x, SD 2.x and SDXL have no such module"
        raise AdapterFormatError(
            f"{source}: {len(unmatched)} of {len(tensors)} keys are not recognized (first: {unmatched[0]!r}; {reason});"
            " skip them with --ignore-unmatched PATTERN if they are not needed"
        )


def _fill_metadata(metadata: AdapterMetadata, parsed: ParsedFile, path: Path, *, has_record: bool) -> AdapterMetadata:
    """Fill in the name, family, variant and format from the file's tensors."""
    shapes = {layer_path: layer.weight_shape for layer_path, layer in parsed.layers.items()}
    family = metadata.family
    if not has_record:
        candidates = candidate_families(shapes) if shapes else ()
        family = choose_family(candidates, metadata.family) if candidates else parsed.family
    variant = metadata.variant or ("inpainting" if _is_inpainting(shapes) else "")
    dialect = "native" if has_record and parsed.dialect == peft.DIALECT else parsed.dialect
    changes = {
        "name": metadata.name or path.stem,
        "family": family,
        "source_format": dialect,
        "variant": variant,
        "notes": tuple(dict.fromkeys((*metadata.notes, *parsed.notes))),
    }
    return metadata.model_copy(update=changes)


def _is_inpainting(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether `conv_in` has nine input channels: latents, mask and masked latents."""
    return shapes.get("unet.conv_in", ())[1:2] == (9,)
