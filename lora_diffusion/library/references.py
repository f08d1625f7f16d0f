"""From references to adapters: files by path, by name and by hash, for presets, recipes, tags and others' pictures."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.masks import with_mask_hash
from lora_diffusion.config.preset import BlendEntry, Region
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.safetensors import file_payload_hash
from lora_diffusion.library.search import Library, default_folder, find_adapter, find_by_hash, open_library
from lora_diffusion.prompts.infotext import Infotext
from lora_diffusion.prompts.tags import Tag


@dataclass(frozen=True, kw_only=True)
class AdapterResolver:
    """Where adapters are looked for by name and by hash."""

    library_folder: Path | None = None
    """Folder of the library; by default the one that the environment names, or the package's own."""

    @cached_property
    def library(self) -> Library:
        """Opened when it is first asked."""
        return open_library(self.library_folder or default_folder())


@dataclass(frozen=True, kw_only=True)
class ResolvedBlend:
    """Loaded adapters, and what a user should know of how they were found."""

    blend: Blend
    notes: tuple[str, ...] = ()


def load_blend(
    entries: Iterable[BlendEntry], resolver: AdapterResolver | None = None, *, ignore: Sequence[str] = ()
) -> ResolvedBlend:
    """The adapters that a preset, recipe or command refers to, checked against their hashes.

    A file that is not where the reference says, or that has changed, is looked for by its hash; what was found
    elsewhere is noted. Raises AdapterFormatError for a file that is no adapter, ConfigError for one that is nowhere, or
    whose content has changed.
    """
    resolver = resolver or AdapterResolver()
    pairs = [load_entry(entry, resolver, ignore) for entry in entries]
    return ResolvedBlend(
        blend=Blend(entries=tuple(item for item, _ in pairs)), notes=tuple(note for _, note in pairs if note)
    )


def load_entry(entry: BlendEntry, resolver: AdapterResolver, ignore: Sequence[str]) -> tuple[WeightedAdapter, str]:
    """One adapter, and a note if it is not the file that the reference names."""
    path = Path(entry.path)
    changed = ""
    if path.exists() or not entry.hash:
        item = load_weighted(entry, path, ignore)
        if not entry.hash or item.hash == entry.hash:
            return item, ""
        changed = f"its content (hash {item.hash[:12]}) is not what the recipe was made with ({entry.hash[:12]})"
    elsewhere = find_by_hash(resolver.library, entry.hash)
    if elsewhere is None:
        reason = changed or f"no such file, and none in {resolver.library.folder} has its hash ({entry.hash[:12]})"
        raise ConfigError(f"{path}: {reason}; give back the original file, or its folder with --library")
    item = load_weighted(entry, elsewhere.path, ignore)
    if item.hash != entry.hash:
        raise AdapterFormatError(f"{elsewhere.path}: is indexed under a hash that it does not have; it has changed")
    return item, f"{path}: {'has changed' if changed else 'is not there'}; {elsewhere.path} has the recorded content"


def load_weighted(entry: BlendEntry, path: Path, ignore: Sequence[str]) -> WeightedAdapter:
    """The adapter in a file with what the reference says of it."""
    return WeightedAdapter(
        adapter=load_adapter(path, ignore=ignore),
        weight=entry.weight,
        path=path,
        region=entry.region and with_mask_hash(entry.region),
        payload_hash=file_payload_hash(path) if path.suffix == ".safetensors" and path.is_file() else "",
    )


def resolve_tags(tags: Iterable[Tag], resolver: AdapterResolver) -> tuple[BlendEntry, ...]:
    """The adapters that tags name, from the library. Raises ConfigError for an unknown name, with the nearest one."""
    return tuple(
        BlendEntry(path=str(find_adapter(resolver.library, tag.name).path), weight=tag.weight, region=tag.region)
        for tag in tags
    )


def resolve_hashes(
    tags: Iterable[Tag], info: Infotext, resolver: AdapterResolver
) -> tuple[tuple[BlendEntry, ...], tuple[str, ...]]:
    """The adapters of a picture of A1111 or Forge, by the hashes that it carries, and by name where it carries none.

    Raises ConfigError for one that is not in the library.
    """
    entries: list[BlendEntry] = []
    notes: list[str] = []
    for tag in tags:
        digest = info.lora_hashes.get(tag.name, "")
        entry = find_by_hash(resolver.library, digest) if digest else None
        if digest and entry is None:
            raise ConfigError(
                f"the picture's adapter {tag.name!r} (hash {digest}) is not in {resolver.library.folder}; give its "
                "folder with --library"
            )
        if entry is None:
            entry = find_adapter(resolver.library, tag.name)
            notes.append(f"the picture has no hash of {tag.name!r}; {entry.path} has its name")
        entries.append(BlendEntry(path=str(entry.path), weight=tag.weight, region=tag.region))
    return tuple(entries), tuple(notes)


def resolve_entry_paths(entries: Iterable[BlendEntry], folder: Path) -> tuple[BlendEntry, ...]:
    """Adapters and masks as a file in that folder names them, with their paths as seen from here."""
    return tuple(
        entry.model_copy(
            update={"path": os.path.normpath(folder / entry.path), "region": resolve_region_path(entry.region, folder)}
        )
        for entry in entries
    )


def resolve_region_path(region: Region | None, folder: Path) -> Region | None:
    if region is None or not region.mask:
        return region
    return region.model_copy(update={"mask": str(folder / region.mask)})


def make_references(blend: Blend, folder: Path) -> tuple[BlendEntry, ...]:
    """The adapters of a blend as a preset in that folder refers to them: by path from there, by name and by hash."""
    return tuple(
        BlendEntry(
            path=relative_path(entry.path or Path(entry.name), folder),
            weight=entry.weight,
            name=entry.name,
            hash=entry.hash,
            payload_hash=entry.payload_hash,
            region=entry.region and entry.region.model_copy(update={"mask": relative_mask(entry.region, folder)}),
        )
        for entry in blend.entries
    )


def relative_path(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def relative_mask(region: Region, folder: Path) -> str:
    return relative_path(Path(region.mask), folder) if region.mask else ""
