"""An adapter on the table: which one, whether it is on, and its weight, in the terms that people set them in."""

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

LEAST, MOST = -2.0, 3.0
"""Range of the weight sliders, where an adapter has none of its own; a preset may hold any number."""
CURVES = {
    "constant": "",
    "fading in": "linear=0@0.0,1@1.0",
    "fading out": "linear=1@0.0,0@1.0",
    "first a little, then in full": "cosine=0.3@0.0,1@0.6",
    "in the middle": "linear=0@0.0,1@0.5,0@1.0",
}
"""Ways of an adapter's factor over the steps, as options have them."""


@dataclass(frozen=True, kw_only=True)
class AdapterSlot:
    """One adapter of the blend, by its path inside the library."""

    name: str
    on: bool = True
    """Off keeps the weight."""
    weight: float = 1.0
    options: str = ""
    """What follows the weight in a tag: `unet=0.8:te=0.3:lbw=MIDD:start=0.2:box=0,0,0.5,1`."""
    full: str = ""
    """A weight as JSON where no tag can say it, such as a routed mixture's; then the options say the region alone."""


def format_reference(row: AdapterSlot) -> str:
    """Return the text that follows a file: `0.8:lbw=MIDD`."""
    return ":".join(filter(None, (f"{row.weight:g}", row.options.strip(": "))))


def entry_from_slot(row: AdapterSlot, library: Library) -> BlendEntry:
    """Return the slot as a preset entry; a disabled one has weight 0. Raises ConfigError."""
    source = f"{row.name}: {row.options}"
    rest, region = extract_region([part for part in format_reference(row).split(":") if part], source=source)
    weight = parse_weight(rest, source=source)
    if row.full:
        whole = validate_weight(row.full, source=row.name)
        weight = whole.model_copy(update={"value": row.weight})
    path = str(find_adapter(library, row.name).path)
    return BlendEntry(path=path, weight=weight if row.on else 0.0, region=region)


def validate_weight(text: str, *, source: str) -> BlendWeight:
    """A weight from its JSON. Raises ConfigError."""
    try:
        return BlendWeight.model_validate_json(text)
    except ValueError:
        raise ConfigError(f"{source}: its weight in full is no readable JSON; load the preset again") from None


def slot_from_entry(entry: BlendEntry, library: Library) -> AdapterSlot:
    """Return the slot of an entry whose file is in the library, found by path or by content.

    Raises ConfigError if it is not there, or if it has changed since the entry was written.
    """
    known = find_known_file(entry, library)
    placed = format_region(entry.region)
    if not isinstance(entry.weight, BlendWeight):
        return AdapterSlot(name=known.relative, weight=entry.weight, options=placed)
    value, _, options = format_weight(entry.weight).partition(":")
    row = AdapterSlot(name=known.relative, weight=float(value), options=":".join(filter(None, (options, placed))))
    if entry_from_slot(row, library).weight == entry.weight:
        return row
    return replace(row, options=placed, full=entry.weight.model_dump_json(exclude_defaults=True))


def find_known_file(entry: BlendEntry, library: Library) -> LibraryEntry:
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
    """Format a region as a tag does."""
    if region is None:
        return ""
    where = f"mask={region.mask}" if region.mask else f"box={','.join(f'{side:g}' for side in region.box or ())}"
    soft = Region.model_fields["feather"].default
    return where if region.feather == soft else f"{where}:feather={region.feather:g}"


def with_options(row: AdapterSlot, **changes: float | str | None) -> AdapterSlot:
    """Return the slot with some options replaced: `with_options(row, unet=0.5, lbw="MIDD", start=None)`."""
    parts = [part for part in row.options.split(":") if part and part.partition("=")[0] not in changes]
    for key, value in changes.items():
        if value not in (None, ""):
            parts.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return replace(row, options=":".join(parts))


def get_option(row: AdapterSlot, key: str) -> str:
    """Return the value of one option; empty if it is not set."""
    found = [part.partition("=")[2] for part in row.options.split(":") if part.partition("=")[0] == key]
    return found[-1] if found else ""


def get_curve(row: AdapterSlot) -> str:
    """Return the schedule option, `linear=0@0,1@1`; empty for none."""
    return next((part for part in row.options.split(":") if part.partition("=")[0] in get_args(Curve)), "")


def with_curve(row: AdapterSlot, curve: str) -> AdapterSlot:
    """The row with that way over the steps in place of what it had. Raises ConfigError for no such thing."""
    kind, _, points = curve.partition("=")
    if curve and kind not in get_args(Curve):
        raise ConfigError(f"{curve!r} is no way over the steps; write linear=0@0.2,1@0.8, factors at positions")
    return with_options(
        row, **{**dict.fromkeys(get_args(Curve), ""), kind: points} if curve else dict.fromkeys(get_args(Curve))
    )


def normalize_options(options: str) -> str:
    """Normalize options. Raises ConfigError for an unknown one."""
    rest, region = extract_region([part for part in options.split(":") if part], source=options)
    weight = validate(BlendWeight, {}, source=options) if not rest else parse_weight(["1", *rest], source=options)
    text = "" if not isinstance(weight, BlendWeight) else format_weight(weight).partition(":")[2]
    return ":".join(filter(None, (text, format_region(region))))
