"""Open a folder of adapters as a library, and find adapters in it by name, by words or by hash.

    library = open_library("adapters")
    entry = find_adapter(library, "neon")

torch is imported only to compute content hashes, which `find_by_hash` tries last.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lora_diffusion.adapters.adapter import adapter_hash
from lora_diffusion.architectures.families import FAMILIES, family_title
from lora_diffusion.core.atomic_files import file_hash, sample_data_folder
from lora_diffusion.core.tables import format_table
from lora_diffusion.errors import AdapterFormatError, ConfigError, LoRADiffusionError
from lora_diffusion.formats.adapters.load import FOLDER_FILE, load_adapter
from lora_diffusion.formats.adapters.pickle import is_pickled
from lora_diffusion.formats.safetensors import file_and_payload_hash
from lora_diffusion.library.entry import LibraryEntry, file_stamp, to_printable
from lora_diffusion.library.index import ENTRY, index_file, load_entries, refresh_index, save_entries

FOLDER_VARIABLE = "LORA_DIFFUSION_LIBRARY"
"""Environment variable with the default library folder."""
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_MAX_CELL_WIDTH = 40
_INTERNAL_FIELDS = {"claims", "stamp", "context"}
"""Fields of an entry that only the index uses."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Library:
    """The adapters below a folder, as they were when the library was opened."""

    folder: Path
    """Absolute path of the folder."""
    entries: tuple[LibraryEntry, ...]
    """All adapters, and files that cannot be used as one, sorted by relative path."""
    index: Path
    """The SQLite file that caches the entries."""

    def __repr__(self) -> str:
        """Describe the library on one line: its folder and the number of entries."""
        return f"Library({str(self.folder)!r}, {len(self.entries)} entries)"


def default_folder() -> Path:
    """Return the folder in the environment variable LORA_DIFFUSION_LIBRARY, or that of the sample adapters."""
    value = os.environ.get(FOLDER_VARIABLE, "")
    return Path(value) if value else sample_data_folder() / "adapters"


def open_library(folder: str | os.PathLike[str]) -> Library:
    """List the adapters below a folder: safetensors files, pickled files, and folders that PEFT saved.

    Only the headers of new and changed files are read. A file that cannot be used gets an entry with a `problem`.

    Args:
        folder: The folder to search, including its subfolders; `~` is expanded.

    Raises:
        ConfigError: If there is no such folder.
    """
    absolute = Path(os.path.abspath(Path(folder).expanduser()))  # noqa: PTH100 (does not resolve symbolic links)
    if not absolute.is_dir():
        reason = "is a file" if absolute.exists() else "no such folder"
        raise ConfigError(f"{folder}: {reason}; give a folder of adapters, or set {FOLDER_VARIABLE} to one")
    index = index_file(absolute)
    return Library(folder=absolute, entries=tuple(refresh_index(absolute, index)), index=index)


def find_adapter(library: Library, name: str) -> LibraryEntry:
    """Find an adapter by name.

    The name is compared with, in this order: the path inside the library; the path or the file's name without the
    suffix; the name in the file's header. If nothing matches, the comparison is repeated ignoring case.

    Raises:
        ConfigError: If no adapter or more than one adapter has that name.
        AdapterFormatError: If the file cannot be used.
    """
    wanted = name.strip().removeprefix("./")
    candidates = [(entry, _list_names(entry)) for entry in library.entries]
    for normalize in (str, str.casefold):
        for tier in range(3):
            matches = [entry for entry, names in candidates if normalize(wanted) in map(normalize, names[tier])]
            if matches:
                return _require_one(matches, name, library)
    raise ConfigError(f"no adapter called {name!r} in {library.folder}; {_suggest_name(library, wanted)}")


def _list_names(entry: LibraryEntry) -> tuple[tuple[str, ...], ...]:
    """Return the names of an adapter in three tiers of precedence.

    The file's name precedes the header's, because all checkpoints of a training run have the same name in the header.
    """
    parent = entry.relative.rpartition("/")[0]
    return (entry.relative,), (f"{parent}/{entry.stem}" if parent else entry.stem, entry.stem), (entry.name,)


def _require_one(matches: Sequence[LibraryEntry], name: str, library: Library) -> LibraryEntry:
    """Return the only match. Raises ConfigError if there are several, AdapterFormatError if it cannot be used."""
    if len(matches) > 1:
        paths = ", ".join(entry.relative for entry in matches)
        raise ConfigError(
            f"{name!r} is ambiguous: it matches {len(matches)} adapters in {library.folder}: {paths}; give one of "
            "these paths"
        )
    if matches[0].problem:
        raise AdapterFormatError(matches[0].problem)
    return matches[0]


def _suggest_name(library: Library, wanted: str) -> str:
    """Return the end of an error message: the most similar name, or how to list all names."""
    known = {name.casefold(): name for entry in library.entries for tier in _list_names(entry)[1:] for name in tier}
    near = difflib.get_close_matches(wanted.casefold(), known, n=1)
    if near:
        return f"did you mean {known[near[0]]!r}?"
    return f"`lora-diffusion library {library.folder}` lists all {len(library.entries)} adapters"


def search(library: Library, text: str, family: str = "") -> tuple[LibraryEntry, ...]:
    """Find the adapters that contain every word of `text` in their name, trigger words, learned tokens or path.

    Args:
        library: The library to search.
        text: Words separated by spaces; case is ignored. The empty text matches everything.
        family: A model family such as `sd1` to restrict the search to; empty for all.

    Raises:
        ConfigError: If there is no such family.
    """
    if family and family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    words = text.casefold().split()
    return tuple(
        entry
        for entry in library.entries
        if (not family or entry.family == family) and all(word in _search_text(entry) for word in words)
    )


def _search_text(entry: LibraryEntry) -> str:
    """Return the case-folded text of an entry that is searched."""
    return "\n".join((entry.name, *entry.trigger_words, *entry.learned_tokens, entry.relative)).casefold()


def find_by_hash(library: Library, digest: str) -> LibraryEntry | None:
    """Find an adapter by its content hash, payload hash or file hash; see `LibraryEntry`.

    Hashes that are not in the index yet are computed until one matches, file hashes before content hashes, and are
    saved in the index.

    Args:
        library: The library to search.
        digest: The first 8 to 64 hexadecimal digits of the hash, with or without `0x`.

    Returns:
        The first match, or None if no usable file has that hash.

    Raises:
        ConfigError: If `digest` is not a hexadecimal number of 8 to 64 digits.
    """
    wanted = digest.strip().lower().removeprefix("0x")
    if not _DIGEST.fullmatch(wanted):
        raise ConfigError(f"hash {digest!r}: expected 8 to 64 hexadecimal digits")
    known = next((entry for entry in library.entries if _has_hash(entry, wanted)), None)
    if known:
        return known
    indexed = load_entries(library.index)
    updated = [indexed.get(entry.relative, entry) for entry in library.entries]
    newest = [new if new.stamp == old.stamp else old for old, new in zip(library.entries, updated, strict=True)]
    known = next((entry for entry in newest if _has_hash(entry, wanted)), None)
    return known or _compute_hashes_until(newest, wanted, library.index)


def _has_hash(entry: LibraryEntry, wanted: str) -> bool:
    """Return whether a computed hash starts with `wanted` and the file has not changed since."""
    known = (entry.content_hash, entry.payload_hash, entry.file_hash)
    return any(digest.startswith(wanted) for digest in known) and _is_unchanged(entry)


def _is_unchanged(entry: LibraryEntry) -> bool:
    """Return whether the file still has the size and modification time that it was read with."""
    return file_stamp(entry.path) == entry.stamp != ""


def _compute_hashes_until(entries: Sequence[LibraryEntry], wanted: str, index: Path) -> LibraryEntry | None:
    """Compute missing hashes until one starts with `wanted`, and save all computed hashes in the index."""
    hashed: dict[str, LibraryEntry] = {}
    usable = [entry for entry in _sort_by_likelihood(entries, wanted) if not entry.problem]
    steps: tuple[Callable[[LibraryEntry], LibraryEntry], ...] = (with_file_hashes, with_content_hash)
    try:
        for step in steps:
            for entry in tqdm(usable, desc="hashing", unit="file", delay=1, leave=False, disable=None):
                known = hashed.get(entry.relative, entry)
                updated = step(known)
                if updated is known or not _is_unchanged(updated):  # no new hash, or the file has changed meanwhile
                    continue
                hashed[updated.relative] = updated
                if _has_hash(updated, wanted):
                    return updated
    finally:
        save_entries(index, hashed, ())
    return None


def _sort_by_likelihood(entries: Iterable[LibraryEntry], wanted: str) -> list[LibraryEntry]:
    """Sort files whose header claims the hash first, and then small files before large ones.

    A claim only decides the order; the hash is computed for these files too.
    """
    return sorted(entries, key=lambda e: (not any(claim.startswith(wanted) for claim in e.claims), e.bytes))


def with_file_hashes(entry: LibraryEntry) -> LibraryEntry:
    """Return the entry with its file hash and payload hash; the same object if the file cannot be read."""
    if entry.file_hash:
        return entry
    file = entry.path / FOLDER_FILE if entry.path.is_dir() else entry.path
    try:
        whole, payload = (file_hash(file, use_cache=False), "") if is_pickled(file) else file_and_payload_hash(file)
    except (AdapterFormatError, OSError):
        return entry
    return replace(entry, file_hash=whole, payload_hash=payload)


def with_content_hash(entry: LibraryEntry) -> LibraryEntry:
    """Load an adapter and return its entry with the content hash, or with a `problem` if it cannot be loaded."""
    if entry.content_hash or entry.problem:
        return entry
    try:
        return replace(entry, content_hash=adapter_hash(load_adapter(entry.path)))
    except LoRADiffusionError as error:
        return replace(entry, problem=to_printable(str(error)))


def entry_to_json(entry: LibraryEntry) -> dict[str, Any]:
    """Convert an entry to a dictionary of JSON values, without the fields that only the index uses."""
    return ENTRY.dump_python(entry, mode="json", exclude=_INTERNAL_FIELDS)


def describe_library(library: Library, entries: Sequence[LibraryEntry]) -> str:
    """Format entries as a table, followed by one line for each problem and note."""
    titles = ("name", "family", "kind", "weight", "triggers", "file")
    rows = [_format_row(entry) for entry in entries if not entry.problem]
    lines = [
        format_table(titles, rows, left=range(len(titles)))
        if rows
        else f"no usable adapters found in {to_printable(str(library.folder))}"
    ]
    lines += [f"problem: {entry.problem}" for entry in entries if entry.problem]
    return "\n".join([*lines, *(f"note: {entry.relative}: {note}" for entry in entries for note in entry.notes)])


def _format_row(entry: LibraryEntry) -> tuple[str, ...]:
    """Return the cells of an entry in the table."""
    weight = "" if entry.preferred_weight is None else f"{entry.preferred_weight:g}"
    words = ", ".join((*entry.trigger_words, *entry.learned_tokens))
    family = " ".join(filter(None, (family_title(entry.family), entry.variant)))
    cells = (entry.name, family, ", ".join(entry.kinds), weight, words)
    return (
        *(_truncate_cell(_strip_control_characters(cell)) for cell in cells),
        _strip_control_characters(entry.relative),
    )


def _strip_control_characters(text: str) -> str:
    """Replace unprintable characters, such as terminal escape sequences in another tool's header, by spaces."""
    return "".join(character if character.isprintable() else " " for character in text)


def _truncate_cell(cell: str) -> str:
    """Shorten a cell of the table to the greatest width."""
    return cell if len(cell) <= _MAX_CELL_WIDTH else f"{cell[: _MAX_CELL_WIDTH - 1]}…"
