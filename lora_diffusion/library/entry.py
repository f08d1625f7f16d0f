"""One adapter of a library: found on disk, and read from its header and the small files beside it.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import cast

from lora_diffusion.errors import LoRADiffusionError
from lora_diffusion.formats.adapters.load import FOLDER_CONFIG, FOLDER_FILE, HEADER_ONLY, Content, read_adapter
from lora_diffusion.formats.adapters.pickle import SUFFIXES, is_pickled

ADAPTER_SUFFIXES = (".safetensors", *SUFFIXES)
PICTURES = ("png", "jpg", "jpeg", "webp", "gif")
SHA256 = re.compile(r"[0-9a-f]{64}")
CLAIMS = ("sshs_model_hash", "modelspec.hash_sha256")
"""Header entries in which a file says what the hash of its tensors is."""


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    """One adapter of a library, or a file that cannot be used as one, with the reason."""

    path: Path
    """Absolute; a folder where PEFT saved one."""
    relative: str
    """The same inside the library's folder, with `/` between its parts."""
    name: str
    family: str = ""
    variant: str = ""
    dialect: str = ""
    kinds: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    """From the file's header, then from the `activation text` of the JSON file beside it."""
    learned_tokens: tuple[str, ...] = ()
    preview: Path | None = None
    """A picture beside it: `name.png`, `name.preview.png`, and so on."""
    preferred_weight: float | None = None
    """From the JSON file beside it, where it is other than 0."""
    weight_range: tuple[float, float] | None = None
    """The least and the greatest weight that it is made for, from `weight range` in that file."""
    bytes: int = 0
    problem: str = ""
    """Why it cannot be used, in one sentence; empty for a usable one."""
    notes: tuple[str, ...] = ()
    """What is odd beside it without making it useless."""
    content_hash: str = ""
    """Over the tensors, as `adapter_hash` has it; of a native file as its header says, which loading it checks."""
    payload_hash: str = ""
    """SHA-256 of the bytes after the header: kohya's `sshs_model_hash`, A1111's `Lora hashes`."""
    file_hash: str = ""
    """SHA-256 of the whole file, whose first ten digits are AutoV2."""
    claims: tuple[str, ...] = ()
    """What the header says of its hashes; believed only so far as to say which file is hashed first."""
    stamp: str = ""
    """Size and time of the file when it was read; another stamp means that it must be read again."""
    context: str = ""
    """The same of the JSON file beside it, and the version that read both."""

    @property
    def stem(self) -> str:
        """The file's name without its suffix; the name of a folder."""
        return adapter_stem(self.path)


def adapter_stem(path: Path) -> str:
    """The name of a file without its suffix, or of a folder, whose dots are part of its name."""
    return path.stem if path.suffix.lower() in ADAPTER_SUFFIXES else path.name


@dataclass(frozen=True, kw_only=True)
class AdapterLocation:
    """An adapter on disk and what lies beside it, before anything is read."""

    path: Path
    relative: str
    sidecar: Path | None
    preview: Path | None
    stamp: str
    context: str


def scan_folder(folder: Path) -> tuple[list[AdapterLocation], list[LibraryEntry]]:
    """Every adapter below a folder, and what cannot even be looked at.

    Hidden files and folders are passed over: half-written files, trash and the like. A folder of PEFT's is one adapter.
    Folders that are reached twice, through links, are looked at once.
    """
    places: list[AdapterLocation] = []
    errors: list[OSError] = []
    listed: dict[Path, Collection[str]] = {}
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=errors.append):
        here, real = Path(root), os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        listed[here] = set(files)
        saved_by_peft = FOLDER_FILE in files and FOLDER_CONFIG in files
        if saved_by_peft:
            places.append(locate_adapter(here, folder, listed.get(here.parent, ())))
        for name in files:
            inside = saved_by_peft and name == FOLDER_FILE
            if name.lower().endswith(ADAPTER_SUFFIXES) and not name.startswith(".") and not inside:
                places.append(locate_adapter(here / name, folder, listed[here]))
    refused = [problem_entry(Path(error.filename), folder, f"cannot be listed ({error.strerror})") for error in errors]
    odd = [place for place in places if not is_text(place.relative)]
    refused += [
        problem_entry(place.path, folder, "its name has a line break or is not valid UTF-8; rename it") for place in odd
    ]
    return [place for place in places if is_text(place.relative)], refused


def locate_adapter(path: Path, folder: Path, neighbors: Collection[str]) -> AdapterLocation:
    """An adapter with its sidecar and preview, which are among the names beside it."""
    stem = adapter_stem(path)
    sidecar = path.with_name(f"{stem}.json")
    sidecar_stamp = file_stamp(sidecar) if sidecar.name in neighbors else ""
    pictures = (f"{stem}{middle}.{suffix}" for suffix in PICTURES for middle in ("", ".preview"))
    preview = next((path.with_name(name) for name in pictures if name in neighbors), None)
    return AdapterLocation(
        path=path,
        relative=path.relative_to(folder).as_posix(),
        sidecar=sidecar if sidecar_stamp else None,
        preview=preview,
        stamp=file_stamp(path),
        context=f"{index_version()} {sidecar_stamp}",
    )


@cache
def index_version() -> str:
    """A newer version may understand what an older one did not, so it reads every file once more."""
    return version("lora-diffusion")


def file_stamp(path: Path) -> str:
    """Size and time of the last change of a file, or of both files of a PEFT folder.

    Empty if there is none, or something that is no file at all, such as a pipe, which nobody should try to read.
    """
    try:
        stats = [(path / name).stat() for name in (FOLDER_FILE, FOLDER_CONFIG)] if path.is_dir() else [path.stat()]
    except OSError:
        return ""
    plain_files = all(stat.S_ISREG(each.st_mode) for each in stats)
    return " ".join(f"{each.st_size}:{each.st_mtime_ns}" for each in stats) if plain_files else ""


def is_text(name: str) -> bool:
    """Whether it can be printed and stored; Linux allows any bytes in a file's name."""
    return to_printable(name) == name


def to_printable(text: str) -> str:
    """The text in one line, with a question mark for what no encoding can hold."""
    return " ".join(text.encode("utf-8", "replace").decode().splitlines())


def problem_entry(path: Path, folder: Path, reason: str) -> LibraryEntry:
    """What stands for something that cannot even be looked at; it never goes into the index."""
    relative = path.relative_to(folder).as_posix()
    return LibraryEntry(
        path=path, relative=relative, name=adapter_stem(path), problem=f"{to_printable(str(path))}: {reason}"
    )


def read_entry(place: AdapterLocation) -> LibraryEntry:
    """What header and sidecar say. A pickled file is not opened: reading it would need torch, and all of the file."""
    beside = read_sidecar(place.sidecar) if place.sidecar else Sidecar()
    entry = LibraryEntry(
        path=place.path,
        relative=place.relative,
        name=adapter_stem(place.path),
        trigger_words=beside.words,
        preview=place.preview,
        preferred_weight=beside.weight,
        weight_range=beside.range,
        bytes=int(place.stamp.partition(":")[0] or 0),
        notes=beside.notes,
        stamp=place.stamp,
        context=place.context,
    )
    if not place.stamp:
        return replace(entry, problem=f"{place.path}: no file, or no right to look at it; is it a link to nowhere?")
    if is_pickled(place.path):
        return replace(entry, dialect="pickled", kinds=("pickled",))
    try:
        return with_header(entry)
    except (LoRADiffusionError, OSError, ValueError) as error:
        return replace(entry, problem=to_printable(str(error)))


def with_header(entry: LibraryEntry) -> LibraryEntry:
    """The entry with what the file's header says. Raises AdapterFormatError."""
    texts: dict[str, str] = {}

    def with_notes(file: Path) -> Content:
        tensors, entries = HEADER_ONLY.file(file)
        texts.update(entries)
        return tensors, entries

    record, adapter = read_adapter(entry.path, replace(HEADER_ONLY, file=with_notes), ())
    metadata = adapter.metadata
    claims = (texts.get(key, "").lower().removeprefix("0x") for key in CLAIMS)
    return replace(
        entry,
        name=entry.stem if entry.path.is_dir() else to_printable(metadata.name).strip() or entry.stem,
        family=metadata.family,
        variant=metadata.variant,
        dialect=metadata.source_format,
        kinds=adapter.kinds,
        trigger_words=unique(map(to_printable, (*metadata.trigger_words, *entry.trigger_words))),
        learned_tokens=unique(map(to_printable, adapter.tokens)),
        content_hash=record.hash if record and SHA256.fullmatch(record.hash) else "",
        claims=unique(claim for claim in claims if SHA256.fullmatch(claim)),
    )


def unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What the JSON file beside an adapter says of it."""

    words: tuple[str, ...] = ()
    weight: float | None = None
    range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def read_sidecar(file: Path) -> Sidecar:
    """Trigger words, preferred weight and notes from the JSON file that A1111 and Forge keep beside an adapter.

    Other tools have files of that name with other things in them, so what is not there is not missed.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = to_printable(str(error))[:80]
        note = f"{file.name} cannot be read as JSON ({reason}); its trigger words and weight are left out"
        return Sidecar(notes=(note,))
    if not isinstance(table, dict):
        return Sidecar()
    text, weight = table.get("activation text"), finite_or_none(table.get("preferred weight"))
    words = (word.strip() for word in to_printable(text).split(",")) if isinstance(text, str) else ()
    return Sidecar(
        words=unique(word for word in words if word),
        weight=weight or None,
        range=parse_range(table.get("weight range")),
    )


def parse_range(value: object) -> tuple[float, float] | None:
    """Two rising numbers, or nothing."""
    if not isinstance(value, list) or len(cast("list[object]", value)) != 2:
        return None
    least, most = map(finite_or_none, cast("list[object]", value))
    return (least, most) if least is not None and most is not None and least < most else None


def finite_or_none(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(cast(float, value)) if usable else None
