"""Any adapter file into an `Adapter`: the one place where dialects are told apart, and every key is accounted for."""

from __future__ import annotations

import json
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
from lora_diffusion.formats.safetensors import read_meta_tensors, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

Content: TypeAlias = "tuple[dict[str, Tensor], dict[str, str]]"


@dataclass(frozen=True, kw_only=True)
class ReadMode:
    """How much of a file is read: its tensors and header entries, and the vectors of a learned token in the header."""

    file: Callable[[Path], Content]
    token: Callable[[Mapping[str, Any]], Tensor]


FULL_FILE = ReadMode(file=read_safetensors, token=native.decode_token)
HEADER_ONLY = ReadMode(file=cast("Callable[[Path], Content]", read_meta_tensors), token=native.token_meta)
FOLDER_FILE, FOLDER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_adapter(path: Path, *, ignore: Sequence[str] = ()) -> Adapter:
    """Read an adapter in any dialect: a file, or a folder that PEFT saved.

    Keys that match a pattern of `ignore` may be there without being understood. Raises AdapterFormatError for a file
    that is damaged, of a kind that is not done here, or not understood in full.
    """
    record, adapter = read_adapter(path, FULL_FILE, ignore)
    validate_adapter(adapter, str(path))
    if record and record.hash and record.hash != adapter_hash(adapter):
        raise AdapterFormatError(f"{path}: its tensors are not those it was saved with; the file is damaged or edited")
    return adapter


def load_unchecked(path: Path, *, ignore: Sequence[str] = ()) -> Adapter:
    """The same for a file whose values are to be looked at, NaN and edited tensors included; not for use in a blend."""
    return read_adapter(path, FULL_FILE, ignore)[1]


def load_meta_adapter(path: Path, *, ignore: Sequence[str] = ()) -> Adapter:
    """The same from the header alone: factors have shape and type, but no values, and torch is not imported.

    A pickled file has no header and is read in full.
    """
    return read_adapter(path, HEADER_ONLY, ignore)[1]


def read_adapter(path: Path, how: ReadMode, ignore: Sequence[str]) -> tuple[Record | None, Adapter]:
    source = str(path)
    config = read_folder_config(path)
    file = path / FOLDER_FILE if path.is_dir() and config is not None else path
    tensors, entries = (read_pickled(file), {}) if is_pickled(file) else how.file(file)
    check_not_pack(entries, source)
    record = read_record(entries, source)
    found = parse_file(tensors, entries, source, config=config, alphas=record.alpha if record else None)
    check_all_matched(found, tensors, ignore, source)
    metadata = fill_metadata(
        record.metadata if record else parse_foreign_metadata(entries), found, path, own=record is not None
    )
    tokens = {**found.tokens, **native.read_tokens(entries, source, how.token)}
    return record, Adapter(layers=found.layers, biases=found.biases, tokens=tokens, metadata=metadata)


def read_folder_config(path: Path) -> dict[str, Any] | None:
    """The settings beside PEFT's own file, which may be given as the file or as its folder; None for any other file."""
    folder = path if path.is_dir() else path.parent
    config = folder / FOLDER_CONFIG
    if not config.is_file() or (path.is_file() and path.name != FOLDER_FILE):
        return None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{config}: cannot be read ({error}); expected PEFT's settings as JSON") from None
    if not isinstance(settings, dict):
        raise AdapterFormatError(f"{config}: is no table of settings")
    kind = settings.get("peft_type", "LORA")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise AdapterFormatError(f"{config}: is a {kind} adapter; LORA, LOHA and LOKR are read")
    return settings


def parse_file(
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, str],
    source: str,
    *,
    config: Mapping[str, Any] | None,
    alphas: Mapping[str, float] | None,
) -> ParsedFile:
    """Ask the reader whose dialect the keys are in. Raises AdapterFormatError that names what else they may be."""
    keys = frozenset(tensors)
    check_supported(unsupported.identify_model(keys), keys, source)
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
    check_supported(unsupported.identify_kind(keys), keys, source)
    first = f"first: {min(keys)!r}" if keys else "it holds no tensors"
    raise AdapterFormatError(
        f"{source}: none of its {len(keys)} tensors is in a known layout ({first}); expected keys of PEFT, diffusers, "
        "kohya, LyCORIS, the older order-keyed files or a learned token"
    )


def check_supported(name: str, keys: frozenset[str], source: str) -> None:
    if name:
        raise AdapterFormatError(f"{source}: is {name}; this toolkit does not do those (first key: {min(keys)!r})")


def check_all_matched(found: ParsedFile, tensors: Mapping[str, Tensor], ignore: Sequence[str], source: str) -> None:
    """Raise AdapterFormatError if any key is not understood and not ignored on purpose."""
    left = [key for key in found.unmatched if not any(fnmatchcase(key, pattern) for pattern in ignore)]
    if left:
        name = unsupported.identify_kind(left)
        meaning = f"they look like {name}" if name else "no module of SD 1.x, SD 2.x or SDXL goes by that name"
        raise AdapterFormatError(
            f"{source}: {len(left)} of {len(tensors)} keys are not understood (first: {left[0]!r}; {meaning}); "
            "ignore them with --ignore-unmatched PATTERN if you know them to be needless"
        )


def fill_metadata(metadata: AdapterMetadata, found: ParsedFile, path: Path, *, own: bool) -> AdapterMetadata:
    """Name, family and dialect filled in from the file itself."""
    shapes = {layer_path: layer.weight_shape for layer_path, layer in found.layers.items()}
    family = metadata.family
    if not own:
        possible = candidate_families(shapes) if shapes else ()
        family = choose_family(possible, metadata.family) if possible else found.family
    variant = metadata.variant or ("inpainting" if is_inpainting(shapes) else "")
    dialect = "native" if own and found.dialect == peft.DIALECT else found.dialect
    changes = {
        "name": metadata.name or path.stem,
        "family": family,
        "source_format": dialect,
        "variant": variant,
        "notes": tuple(dict.fromkeys((*metadata.notes, *found.notes))),
    }
    return metadata.model_copy(update=changes)


def is_inpainting(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the UNet's first convolution reads nine channels: latents, mask and masked latents."""
    return shapes.get("unet.conv_in", ())[1:2] == (9,)
