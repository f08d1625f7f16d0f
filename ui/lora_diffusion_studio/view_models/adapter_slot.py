"""One adapter of the blend as the Blend tab shows it: file, weight, and the options of a `<lora:...>` tag."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from lora_diffusion.config.preset import BlendEntry, BlendWeight, Curve, Region
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.entry import LibraryEntry
from lora_diffusion.library.search import Library, find_adapter, find_by_hash, with_content_hash
from lora_diffusion.prompts.tags import extract_region, format_weight, parse_weight

MIN_WEIGHT, MAX_WEIGHT = -2.0, 3.0
"""Range of a weight slider if the adapter does not define its own. Presets may hold any weight."""
SCHEDULES = {
    "Constant": "",
    "Fade in": "linear=0@0.0,1@1.0",
    "Fade out": "linear=1@0.0,0@1.0",
    "Ramp up": "cosine=0.3@0.0,1@0.6",
    "Peak in the middle": "linear=0@0.0,1@0.5,0@1.0",
}
"""Weight schedules on offer: label to tag option. Each point is factor@fraction of the steps."""


@dataclass(frozen=True, kw_only=True)
class AdapterSlot:
    """One adapter of the blend, named by its path inside the library."""

    name: str
    enabled: bool = True
    """Whether the adapter is applied. A disabled slot keeps its weight."""
    weight: float = 1.0
    options: str = ""
    """Options after the weight in a tag: `unet=0.8:te=0.3:lbw=MIDD:start=0.2:box=0,0,0.5,1`."""
    weight_json: str = ""
    """A `BlendWeight` as JSON, for weights that a tag cannot express, such as those of a routed mixture.

    If set, `options` holds the region only.
    """


def format_reference(slot: AdapterSlot) -> str:
    """Return what follows the file name in a tag or an `--adapter` flag: `0.8:lbw=MIDD`."""
    return ":".join(filter(None, (f"{slot.weight:g}", slot.options.strip(": "))))


def entry_from_slot(slot: AdapterSlot, library: Library) -> BlendEntry:
    """Return the slot as a preset entry. A disabled slot gets weight 0.

    Raises:
        ConfigError: If an option is invalid or the adapter is not in the library.
    """
    source = f"{slot.name}: {slot.options}"
    rest, region = extract_region([part for part in format_reference(slot).split(":") if part], source=source)
    weight = parse_weight(rest, source=source)
    if slot.weight_json:
        weight = _parse_weight_json(slot.weight_json, source=slot.name).model_copy(update={"value": slot.weight})
    path = str(find_adapter(library, slot.name).path)
    return BlendEntry(path=path, weight=weight if slot.enabled else 0.0, region=region)


def _parse_weight_json(text: str, *, source: str) -> BlendWeight:
    try:
        return BlendWeight.model_validate_json(text)
    except ValueError:
        raise ConfigError(f"{source}: the weight (JSON) is not valid; load the preset again to restore it") from None


def slot_from_entry(entry: BlendEntry, library: Library) -> AdapterSlot:
    """Return the slot of a preset entry. The file is looked up in the library by path, then by content hash.

    Raises:
        ConfigError: If the file is not in the library, or has changed since the entry was written.
    """
    found = _find_library_file(entry, library)
    region = format_region(entry.region)
    if not isinstance(entry.weight, BlendWeight):
        return AdapterSlot(name=found.relative, weight=entry.weight, options=region)
    value, _, options = format_weight(entry.weight).partition(":")
    slot = AdapterSlot(name=found.relative, weight=float(value), options=":".join(filter(None, (options, region))))
    if entry_from_slot(slot, library).weight == entry.weight:
        return slot
    return replace(slot, options=region, weight_json=entry.weight.model_dump_json(exclude_defaults=True))


def _find_library_file(entry: BlendEntry, library: Library) -> LibraryEntry:
    path = Path(os.path.normpath(Path(entry.path).absolute()))
    name = entry.name or path.stem
    at_path = next((each for each in library.entries if each.path == path and not each.problem), None)
    if at_path and entry.hash in ("", with_content_hash(at_path).content_hash):
        return at_path
    elsewhere = find_by_hash(library, entry.hash) if entry.hash else None
    if elsewhere:
        return elsewhere
    if at_path:
        raise ConfigError(f"{name}: {at_path.relative} has changed since this was saved (hash {entry.hash[:12]})")
    raise ConfigError(f"{name}: is not in the library {library.folder}; copy its file there")


def format_region(region: Region | None) -> str:
    """Return a region as tag options: `box=0,0,0.5,1` or `mask=PATH`, with `feather=` if it is not the default."""
    if region is None:
        return ""
    area = f"mask={region.mask}" if region.mask else f"box={','.join(f'{side:g}' for side in region.box or ())}"
    default = Region.model_fields["feather"].default
    return area if region.feather == default else f"{area}:feather={region.feather:g}"


def with_options(slot: AdapterSlot, **changes: float | str | None) -> AdapterSlot:
    """Return the slot with some options replaced: `with_options(slot, unet=0.5, lbw="MIDD", start=None)`.

    None and the empty string remove an option.
    """
    parts = [part for part in slot.options.split(":") if part and part.partition("=")[0] not in changes]
    for key, value in changes.items():
        if value not in (None, ""):
            parts.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return replace(slot, options=":".join(parts))


def get_option(slot: AdapterSlot, key: str) -> str:
    """Return the value of one option, or the empty string."""
    found = [part.partition("=")[2] for part in slot.options.split(":") if part.partition("=")[0] == key]
    return found[-1] if found else ""


def get_schedule(slot: AdapterSlot) -> str:
    """Return the schedule option, such as `linear=0@0,1@1`, or the empty string."""
    return next((part for part in slot.options.split(":") if part.partition("=")[0] in get_args(Curve)), "")


def with_schedule(slot: AdapterSlot, schedule: str) -> AdapterSlot:
    """Return the slot with another schedule option. The empty string removes the schedule.

    Raises:
        ConfigError: If `schedule` does not start with the name of a curve.
    """
    kind, _, points = schedule.partition("=")
    if schedule and kind not in get_args(Curve):
        raise ConfigError(
            f"{schedule!r} is not a weight schedule; write CURVE=FACTOR@STEP,..., for example linear=0@0.2,1@0.8, "
            f"with one of the curves {', '.join(get_args(Curve))}"
        )
    changes: dict[str, float | str | None] = dict.fromkeys(get_args(Curve))
    return with_options(slot, **({**changes, kind: points} if schedule else changes))


def normalize_options(options: str) -> str:
    """Return tag options in their usual order and spelling.

    Raises:
        ConfigError: If an option is unknown or has an invalid value.
    """
    rest, region = extract_region([part for part in options.split(":") if part], source=options)
    weight = validate(BlendWeight, {}, source=options) if not rest else parse_weight(["1", *rest], source=options)
    text = "" if not isinstance(weight, BlendWeight) else format_weight(weight).partition(":")[2]
    return ":".join(filter(None, (text, format_region(region))))
