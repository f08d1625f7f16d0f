"""Find and load the adapters that presets, recipes, prompt tags and images of other programs refer to.

An adapter is referred to by path, by name or by hash.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.masks import with_mask_hash
from lora_diffusion.config.preset import BlendEntry, Region
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.adapters.weighted import load_weighted_adapter
from lora_diffusion.library.search import Library, default_folder, find_adapter, find_by_hash, open_library
from lora_diffusion.prompts.infotext import Infotext
from lora_diffusion.prompts.tags import Tag


@dataclass(frozen=True, kw_only=True)
class AdapterResolver:
    """The library in which adapters are looked up by name and by hash."""

    library_folder: str | os.PathLike[str] | None = None
    """Folder of the library; by default that of `default_folder`."""

    @cached_property
    def library(self) -> Library:
        """The library, opened on first use."""
        return open_library(self.library_folder or default_folder())


@dataclass(frozen=True, kw_only=True)
class ResolvedBlend:
    """Loaded adapters, with notes for the user on where they were found."""

    blend: Blend
    """The loaded adapters with their weights."""
    notes: tuple[str, ...] = ()
    """One sentence for each adapter that was found at another path than the reference names."""


def load_blend(
    entries: Iterable[BlendEntry], resolver: AdapterResolver | None = None, *, ignore: Sequence[str] = ()
) -> ResolvedBlend:
    """Load the adapters that a preset, recipe or command refers to, and check their hashes.

    If a file is missing or has changed, the library is searched for a file with the recorded hash.

    Args:
        entries: The references, each with a path, a weight and perhaps a hash.
        resolver: The library to search.
        ignore: Patterns of tensor keys that `load_adapter` may leave unread.

    Raises:
        AdapterFormatError: If a file is not a valid adapter.
        ConfigError: If no file with the recorded hash is found.
    """
    resolver = resolver or AdapterResolver()
    pairs = [_load_entry(entry, resolver, ignore) for entry in entries]
    return ResolvedBlend(
        blend=Blend(entries=tuple(item for item, _ in pairs)), notes=tuple(note for _, note in pairs if note)
    )


def _load_entry(entry: BlendEntry, resolver: AdapterResolver, ignore: Sequence[str]) -> tuple[WeightedAdapter, str]:
    """Load one adapter; the second value is a note if it is not the file that the reference names."""
    path = Path(entry.path)
    changed = ""
    if path.exists() or not entry.hash:
        item = _load_weighted(entry, path, ignore)
        if not entry.hash or item.hash == entry.hash:
            return item, ""
        changed = f"its hash {item.hash[:12]} differs from the recorded hash {entry.hash[:12]}"
    elsewhere = find_by_hash(resolver.library, entry.hash)
    if elsewhere is None:
        reason = changed or f"no such file, and none in {resolver.library.folder} has the hash {entry.hash[:12]}"
        raise ConfigError(f"{path}: {reason}; restore the original file, or give its folder with --library")
    item = _load_weighted(entry, elsewhere.path, ignore)
    if item.hash != entry.hash:
        raise AdapterFormatError(
            f"{elsewhere.path}: the file has changed since its hash was indexed; run the command again"
        )
    return (
        item,
        f"{path}: {'has changed' if changed else 'not found'}; using {elsewhere.path}, which has the recorded hash",
    )


def _load_weighted(entry: BlendEntry, path: Path, ignore: Sequence[str]) -> WeightedAdapter:
    """Load an adapter file with the weight and region of its reference."""
    return load_weighted_adapter(
        path, entry.weight, region=entry.region and with_mask_hash(entry.region), ignore=ignore
    )


def resolve_tags(tags: Iterable[Tag], resolver: AdapterResolver) -> tuple[BlendEntry, ...]:
    """Find the adapters of `<lora:name:weight>` tags in the library.

    Raises:
        ConfigError: If a name is unknown (the message suggests the nearest one) or ambiguous.
        AdapterFormatError: If a file cannot be used.
    """
    return tuple(
        BlendEntry(path=str(find_adapter(resolver.library, tag.name).path), weight=tag.weight, region=tag.region)
        for tag in tags
    )


def resolve_hashes(
    tags: Iterable[Tag], info: Infotext, resolver: AdapterResolver
) -> tuple[tuple[BlendEntry, ...], tuple[str, ...]]:
    """Find the adapters of an image that A1111 or Forge made, by hash, or by name if the image has no hash for one.

    Args:
        tags: The `<lora:...>` tags of the image's prompt.
        info: The image's infotext with its `Lora hashes`.
        resolver: The library to search.

    Returns:
        The references, and a note for each adapter that was found by name only.

    Raises:
        ConfigError: If an adapter is not in the library.
        AdapterFormatError: If a file cannot be used.
    """
    entries: list[BlendEntry] = []
    notes: list[str] = []
    for tag in tags:
        digest = info.lora_hashes.get(tag.name, "")
        entry = find_by_hash(resolver.library, digest) if digest else None
        if digest and entry is None:
            raise ConfigError(
                f"the image's adapter {tag.name!r} (hash {digest}) is not in {resolver.library.folder}; give its "
                "folder with --library"
            )
        if entry is None:
            entry = find_adapter(resolver.library, tag.name)
            notes.append(f"the image has no hash for {tag.name!r}; using {entry.path}, which has that name")
        entries.append(BlendEntry(path=str(entry.path), weight=tag.weight, region=tag.region))
    return tuple(entries), tuple(notes)


def resolve_entry_paths(entries: Iterable[BlendEntry], folder: str | os.PathLike[str]) -> tuple[BlendEntry, ...]:
    """Resolve the paths of adapters and masks that are relative to a folder, such as that of a preset file."""
    folder = Path(folder)
    return tuple(
        entry.model_copy(
            update={"path": os.path.normpath(folder / entry.path), "region": _resolve_region_path(entry.region, folder)}
        )
        for entry in entries
    )


def _resolve_region_path(region: Region | None, folder: Path) -> Region | None:
    """Resolve the path of a region's mask that is relative to a folder."""
    if region is None or not region.mask:
        return region
    return region.model_copy(update={"mask": str(folder / region.mask)})


def make_references(blend: Blend, folder: str | os.PathLike[str]) -> tuple[BlendEntry, ...]:
    """Create references to the adapters of a blend: by path relative to a folder, by name and by hash."""
    folder = Path(folder)
    return tuple(
        BlendEntry(
            path=_relative_path(entry.path or Path(entry.name), folder),
            weight=entry.weight,
            name=entry.name,
            hash=entry.hash,
            payload_hash=entry.payload_hash,
            region=entry.region and entry.region.model_copy(update={"mask": _relative_mask(entry.region, folder)}),
        )
        for entry in blend.entries
    )


def _relative_path(path: Path, folder: Path) -> str:
    """Return a path relative to a folder, with `/` as the separator."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _relative_mask(region: Region, folder: Path) -> str:
    """Return the path of a region's mask relative to a folder; empty if it has none."""
    return _relative_path(Path(region.mask), folder) if region.mask else ""
