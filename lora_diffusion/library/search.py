"""A folder of adapters, in which one is found by its name or by a hash.

    library = open_library(Path("adapters"))
    entry = find(library, "neon")

Whatever refers to an adapter by name, hash or tag comes through here. Only content hashes of other tools' files need
torch, when none of the cheaper hashes is the one looked for.
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
from lora_diffusion.errors import AdapterFormatError, ConfigError, LoRADiffusionError
from lora_diffusion.formats.adapters.load import FOLDER_FILE, load_adapter
from lora_diffusion.formats.adapters.pickle import is_pickled
from lora_diffusion.formats.safetensors import read_header
from lora_diffusion.library.entry import LibraryEntry, file_stamp, to_printable
from lora_diffusion.library.index import ENTRY, index_file, load_entries, refresh_index, save_entries

FOLDER_VARIABLE = "LORA_DIFFUSION_LIBRARY"
DIGEST = re.compile(r"[0-9a-f]{8,64}")
WIDEST_CELL = 40
INTERNAL = {"claims", "stamp", "context"}
"""Fields of an entry that are the index's own business."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """The adapters below a folder as they were when it was opened, sorted by path."""

    folder: Path
    entries: tuple[LibraryEntry, ...]
    index: Path
    """Where what is known of them is kept."""


def default_folder() -> Path:
    """The folder that LORA_DIFFUSION_LIBRARY names, or that of the package's own adapters."""
    named = os.environ.get(FOLDER_VARIABLE, "")
    return Path(named) if named else sample_data_folder() / "adapters"


def open_library(folder: Path) -> Library:
    """The adapters below a folder: safetensors, pickled files, and folders that PEFT saved.

    Only headers of new and changed files are read. A file that cannot be used is there too, with its problem. Raises
    ConfigError if there is no such folder.
    """
    absolute = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 (keeps links in the path as the user gave them)
    if not absolute.is_dir():
        reason = "is a file" if absolute.exists() else "no such folder"
        raise ConfigError(f"{folder}: {reason}; give a folder of adapters, or name one in {FOLDER_VARIABLE}")
    index = index_file(absolute)
    return Library(folder=absolute, entries=tuple(refresh_index(absolute, index)), index=index)


def find_adapter(library: Library, name: str) -> LibraryEntry:
    """The one adapter of that name.

    A name is, in this order: the path inside the library; the same without its suffix, or the file's name without it;
    the name in the file's header; and any of them in other letters of case. Raises ConfigError for a name that is
    unknown or means several, AdapterFormatError for a file that cannot be used.
    """
    wanted = name.strip().removeprefix("./")
    named = [(entry, list_names(entry)) for entry in library.entries]
    for same in (str, str.casefold):
        for tier in range(3):
            found = [entry for entry, names in named if same(wanted) in map(same, names[tier])]
            if found:
                return require_one(found, name, library)
    raise ConfigError(f"no adapter called {name!r} in {library.folder}; {suggest_name(library, wanted)}")


def list_names(entry: LibraryEntry) -> tuple[tuple[str, ...], ...]:
    """What an adapter may be called, in the order in which names count.

    The file's name comes before the header's, which the states of one training run have in common.
    """
    inside = entry.relative.rpartition("/")[0]
    return (entry.relative,), (f"{inside}/{entry.stem}" if inside else entry.stem, entry.stem), (entry.name,)


def require_one(found: Sequence[LibraryEntry], name: str, library: Library) -> LibraryEntry:
    """The one that was found. Raises ConfigError if there are several, AdapterFormatError if it cannot be used."""
    if len(found) > 1:
        paths = ", ".join(entry.relative for entry in found)
        raise ConfigError(f"{name!r} means {len(found)} adapters in {library.folder}: {paths}; give one of these paths")
    if found[0].problem:
        raise AdapterFormatError(found[0].problem)
    return found[0]


def suggest_name(library: Library, wanted: str) -> str:
    """The nearest name, or where to look for one."""
    known = {name.casefold(): name for entry in library.entries for tier in list_names(entry)[1:] for name in tier}
    near = difflib.get_close_matches(wanted.casefold(), known, n=1)
    if near:
        return f"did you mean {known[near[0]]!r}?"
    return f"`lora-diffusion library {library.folder}` lists the {len(library.entries)} that are there"


def search(library: Library, text: str, family: str = "") -> tuple[LibraryEntry, ...]:
    """The adapters with every word of `text` in their name, trigger words, learned tokens or path.

    Raises ConfigError for a family that does not exist.
    """
    if family and family not in FAMILIES:
        raise ConfigError(f"family {family!r}: there is none of that name; choose one of {', '.join(FAMILIES)}")
    words = text.casefold().split()
    return tuple(
        entry
        for entry in library.entries
        if (not family or entry.family == family) and all(word in search_text(entry) for word in words)
    )


def search_text(entry: LibraryEntry) -> str:
    return "\n".join((entry.name, *entry.trigger_words, *entry.learned_tokens, entry.relative)).casefold()


def find_by_hash(library: Library, digest: str) -> LibraryEntry | None:
    """The adapter with a hash that begins with `digest`: of its content, of its bytes after the header, of its file.

    What is not known yet is computed, cheap hashes before content hashes, up to the first that fits, and kept in the
    index; None means that every usable file has been looked at. The entry has a problem if loading it has shown one.
    Raises ConfigError for a digest of fewer than 8 digits.
    """
    wanted = digest.strip().lower().removeprefix("0x")
    if not DIGEST.fullmatch(wanted):
        raise ConfigError(f"hash {digest!r}: expected 8 to 64 hexadecimal digits")
    known = next((entry for entry in library.entries if has_hash(entry, wanted)), None)
    if known:
        return known
    indexed = load_entries(library.index)
    later = [indexed.get(entry.relative, entry) for entry in library.entries]
    newest = [new if new.stamp == old.stamp else old for old, new in zip(library.entries, later, strict=True)]
    known = next((entry for entry in newest if has_hash(entry, wanted)), None)
    return known or compute_hashes_until(newest, wanted, library.index)


def has_hash(entry: LibraryEntry, wanted: str) -> bool:
    """Whether a known hash begins so, and the file is still the one that has it."""
    known = (entry.content_hash, entry.payload_hash, entry.file_hash)
    return any(digest.startswith(wanted) for digest in known) and is_unchanged(entry)


def is_unchanged(entry: LibraryEntry) -> bool:
    return file_stamp(entry.path) == entry.stamp != ""


def compute_hashes_until(entries: Sequence[LibraryEntry], wanted: str, index: Path) -> LibraryEntry | None:
    """Compute what is missing until a hash fits; what has been computed by then goes into the index."""
    hashed: dict[str, LibraryEntry] = {}
    usable = [entry for entry in sort_by_likelihood(entries, wanted) if not entry.problem]
    steps: tuple[Callable[[LibraryEntry], LibraryEntry], ...] = (with_file_hashes, with_content_hash)
    try:
        for step in steps:
            for entry in tqdm(usable, desc="hashing", unit="file", delay=1, leave=False, disable=None):
                known = hashed.get(entry.relative, entry)
                more = step(known)
                if more is known or not is_unchanged(more):  # nothing new, or the file has changed meanwhile
                    continue
                hashed[more.relative] = more
                if has_hash(more, wanted):
                    return more
    finally:
        save_entries(index, hashed, ())
    return None


def sort_by_likelihood(entries: Iterable[LibraryEntry], wanted: str) -> list[LibraryEntry]:
    """Files that claim the hash come first, though it is computed for them too; then small ones before large ones."""
    return sorted(entries, key=lambda e: (not any(claim.startswith(wanted) for claim in e.claims), e.bytes))


def with_file_hashes(entry: LibraryEntry) -> LibraryEntry:
    """The entry with the hashes of its bytes, unchanged if the file has gone."""
    if entry.file_hash:
        return entry
    file = entry.path / FOLDER_FILE if entry.path.is_dir() else entry.path
    try:
        start = 0 if is_pickled(file) else read_header(file).data_start
        whole = file_hash(file, use_cache=False)
        payload = file_hash(file, start=start, use_cache=False) if start else ""
    except (AdapterFormatError, OSError):
        return entry
    return replace(entry, file_hash=whole, payload_hash=payload)


def with_content_hash(entry: LibraryEntry) -> LibraryEntry:
    """The entry with the hash of its tensors, or with the problem that only loading it has brought to light."""
    if entry.content_hash or entry.problem:
        return entry
    try:
        return replace(entry, content_hash=adapter_hash(load_adapter(entry.path)))
    except LoRADiffusionError as error:
        return replace(entry, problem=to_printable(str(error)))


def entry_to_json(entry: LibraryEntry) -> dict[str, Any]:
    """An entry as plain values, ready for JSON."""
    return ENTRY.dump_python(entry, mode="json", exclude=INTERNAL)


def describe_library(library: Library, entries: Sequence[LibraryEntry]) -> str:
    """An aligned table of the usable entries, and a line for each problem and note."""
    titles = ("name", "family", "kind", "weight", "triggers", "file")
    rows = [titles, *(format_row(entry) for entry in entries if not entry.problem)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(rows) == 1:
        lines = [f"no usable adapters found in {to_printable(str(library.folder))}"]
    lines += [f"problem: {entry.problem}" for entry in entries if entry.problem]
    return "\n".join([*lines, *(f"note: {entry.relative}: {note}" for entry in entries for note in entry.notes)])


def format_row(entry: LibraryEntry) -> tuple[str, ...]:
    weight = "" if entry.preferred_weight is None else f"{entry.preferred_weight:g}"
    words = ", ".join((*entry.trigger_words, *entry.learned_tokens))
    family = " ".join(filter(None, (family_title(entry.family), entry.variant)))
    cells = (entry.name, family, ", ".join(entry.kinds), weight, words)
    return (
        *(truncate_cell(strip_control_characters(cell)) for cell in cells),
        strip_control_characters(entry.relative),
    )


def strip_control_characters(text: str) -> str:
    """A text of another tool's without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def truncate_cell(cell: str) -> str:
    return cell if len(cell) <= WIDEST_CELL else f"{cell[: WIDEST_CELL - 1]}…"
