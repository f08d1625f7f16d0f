"""Scan a folder for adapters, and read what their headers, sidecar files and previews say.

The tensors are not read, so nothing here imports torch.
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

from lora_diffusion.errors import LoRADiffusionError
from lora_diffusion.formats.adapters.load import FOLDER_CONFIG, FOLDER_FILE, HEADER_ONLY, Content, read_adapter
from lora_diffusion.formats.adapters.pickle import SUFFIXES, is_pickled
from lora_diffusion.formats.json_values import is_array, is_object

ADAPTER_SUFFIXES = (".safetensors", *SUFFIXES)
"""Suffixes of adapter files, lower case: safetensors and pickled ones."""
PREVIEW_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif")
"""Suffixes of preview images, in the order in which they are looked for."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASH_KEYS = ("sshs_model_hash", "modelspec.hash_sha256")
"""Header entries in which other tools record the hash of the tensors."""


@dataclass(frozen=True, kw_only=True)
class LibraryEntry:
    """An adapter in a library, or a file that cannot be used as one.

    The sidecar is the JSON file with the adapter's name that A1111 and Forge write next to it.
    """

    path: Path
    """Absolute path of the file, or of the folder if PEFT saved the adapter."""
    relative: str
    """Path inside the library's folder, with `/` as the separator."""
    name: str
    """Name from the file's header, or else the file's name without its suffix."""
    family: str = ""
    """Model family, such as `sd1`; empty if unknown."""
    variant: str = ""
    """Variant of the base within the family, such as `v-prediction` or `inpainting`; usually empty."""
    dialect: str = ""
    """File format: `native`, `kohya`, `peft`, `pickled` and so on."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `LoRA`, `LoHa` or `textual inversion`."""
    trigger_words: tuple[str, ...] = ()
    """Trigger words from the file's header, then from `activation text` in the sidecar."""
    learned_tokens: tuple[str, ...] = ()
    """Tokens with embeddings in the file (textual inversion)."""
    preview: Path | None = None
    """An image next to the file: `name.png`, `name.preview.png`, and so on."""
    preferred_weight: float | None = None
    """`preferred weight` in the sidecar; None if it is missing or 0."""
    weight_range: tuple[float, float] | None = None
    """Least and greatest useful weight, from `weight range` in the sidecar."""
    bytes: int = 0
    """Size of the weight file in bytes."""
    problem: str = ""
    """Why the file cannot be used, in one sentence; empty if it can."""
    notes: tuple[str, ...] = ()
    """Harmless problems, such as a sidecar that is not valid JSON."""
    content_hash: str = ""
    """`adapter_hash` of the tensors. For a native file it comes from the header; loading the file verifies it."""
    payload_hash: str = ""
    """SHA-256 of the bytes after the header: kohya's `sshs_model_hash`, A1111's `Lora hashes`."""
    file_hash: str = ""
    """SHA-256 of the whole file; its first ten digits are the AutoV2 hash."""
    claims: tuple[str, ...] = ()
    """Hashes recorded in the header. They are not trusted; they only decide which file is hashed first."""
    stamp: str = ""
    """Size and modification time of the file when it was read. If they change, the file is read again."""
    context: str = ""
    """Size and modification time of the sidecar, and the version of this package that read both files."""

    @property
    def stem(self) -> str:
        """The name of the file without its suffix, or the name of the folder."""
        return adapter_stem(self.path)


def adapter_stem(path: str | os.PathLike[str]) -> str:
    """Return the name of an adapter file without its suffix, or the whole name of a PEFT folder.

    Dots in a folder's name are not taken for a suffix.
    """
    path = Path(path)
    return path.stem if path.suffix.lower() in ADAPTER_SUFFIXES else path.name


@dataclass(frozen=True, kw_only=True)
class AdapterLocation:
    """Where an adapter, its sidecar and its preview are on disk; nothing has been read yet."""

    path: Path
    """Absolute path of the file or PEFT folder."""
    relative: str
    """Path inside the library's folder, with `/` as the separator."""
    sidecar: Path | None
    """The JSON file with the adapter's name next to it."""
    preview: Path | None
    """An image with the adapter's name next to it."""
    stamp: str
    """Size and modification time of the file; see `file_stamp`."""
    context: str
    """Version of this package, and size and modification time of the sidecar."""


def scan_folder(folder: str | os.PathLike[str]) -> tuple[list[AdapterLocation], list[LibraryEntry]]:
    """Find every adapter below a folder.

    Hidden files and folders are skipped. A folder that PEFT saved counts as one adapter. Symbolic links are followed,
    and a folder that is reached twice is scanned once.

    Returns:
        The adapters, and an entry with a problem for each file or folder that cannot be listed or has an unusable name.
    """
    folder = Path(folder)
    locations: list[AdapterLocation] = []
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
            locations.append(_locate_adapter(here, folder, listed.get(here.parent, ())))
        for name in files:
            inside = saved_by_peft and name == FOLDER_FILE
            if name.lower().endswith(ADAPTER_SUFFIXES) and not name.startswith(".") and not inside:
                locations.append(_locate_adapter(here / name, folder, listed[here]))
    refused = [
        _problem_entry(Path(error.filename), folder, f"cannot be listed ({error.strerror}); check its permissions")
        for error in errors
    ]
    refused += [
        _problem_entry(location.path, folder, "its name has a line break or is not valid UTF-8; rename it")
        for location in locations
        if not _is_text(location.relative)
    ]
    return [location for location in locations if _is_text(location.relative)], refused


def _locate_adapter(path: Path, folder: Path, neighbors: Collection[str]) -> AdapterLocation:
    """Find the sidecar and the preview of an adapter among the names in its folder."""
    stem = adapter_stem(path)
    sidecar = path.with_name(f"{stem}.json")
    sidecar_stamp = file_stamp(sidecar) if sidecar.name in neighbors else ""
    previews = (f"{stem}{middle}.{suffix}" for suffix in PREVIEW_SUFFIXES for middle in ("", ".preview"))
    preview = next((path.with_name(name) for name in previews if name in neighbors), None)
    return AdapterLocation(
        path=path,
        relative=path.relative_to(folder).as_posix(),
        sidecar=sidecar if sidecar_stamp else None,
        preview=preview,
        stamp=file_stamp(path),
        context=f"{_package_version()} {sidecar_stamp}",
    )


@cache
def _package_version() -> str:
    """Return the version of this package; a newer one may read formats that an older one could not."""
    return version("lora-diffusion")


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Return size and modification time of a file, or of both files of a PEFT folder.

    Returns:
        `size:nanoseconds` for each file; empty if the file is missing or is not a regular file (a pipe, for instance).
    """
    path = Path(path)
    try:
        stats = [(path / name).stat() for name in (FOLDER_FILE, FOLDER_CONFIG)] if path.is_dir() else [path.stat()]
    except OSError:
        return ""
    plain_files = all(stat.S_ISREG(each.st_mode) for each in stats)
    return " ".join(f"{each.st_size}:{each.st_mtime_ns}" for each in stats) if plain_files else ""


def _is_text(name: str) -> bool:
    """Return whether a name can be printed and stored; Linux allows any bytes in file names."""
    return to_printable(name) == name


def to_printable(text: str) -> str:
    """Join the lines of a text and replace characters that are not valid Unicode by question marks."""
    return " ".join(text.encode("utf-8", "replace").decode().splitlines())


def _problem_entry(path: Path, folder: Path, reason: str) -> LibraryEntry:
    """Return an entry for something that cannot be read. It has no stamp, so it never goes into the index."""
    relative = path.relative_to(folder).as_posix()
    return LibraryEntry(
        path=path, relative=relative, name=adapter_stem(path), problem=f"{to_printable(str(path))}: {reason}"
    )


def read_entry(location: AdapterLocation) -> LibraryEntry:
    """Read the header and the sidecar of an adapter.

    Pickled files are not opened, because that would need torch and the whole file. Errors do not raise: they become
    the entry's `problem`.
    """
    sidecar = _read_sidecar(location.sidecar) if location.sidecar else _Sidecar()
    entry = LibraryEntry(
        path=location.path,
        relative=location.relative,
        name=adapter_stem(location.path),
        trigger_words=sidecar.words,
        preview=location.preview,
        preferred_weight=sidecar.weight,
        weight_range=sidecar.range,
        bytes=int(location.stamp.partition(":")[0] or 0),
        notes=sidecar.notes,
        stamp=location.stamp,
        context=location.context,
    )
    if not location.stamp:
        return replace(
            entry,
            problem=f"{location.path}: not a readable file; check its permissions, or whether it is a broken link",
        )
    if is_pickled(location.path):
        return replace(entry, dialect="pickled", kinds=("pickled",))
    try:
        return _with_header(entry)
    except (LoRADiffusionError, OSError, ValueError) as error:
        return replace(entry, problem=to_printable(str(error)))


def _with_header(entry: LibraryEntry) -> LibraryEntry:
    """Return the entry with the facts in the file's header. Raises AdapterFormatError."""
    header: dict[str, str] = {}

    def read_and_record_header(file: Path) -> Content:
        tensors, header_entries = HEADER_ONLY.file(file)
        header.update(header_entries)
        return tensors, header_entries

    record, adapter = read_adapter(entry.path, replace(HEADER_ONLY, file=read_and_record_header), ())
    metadata = adapter.metadata
    claims = (header.get(key, "").lower().removeprefix("0x") for key in _HASH_KEYS)
    return replace(
        entry,
        name=entry.stem if entry.path.is_dir() else to_printable(metadata.name).strip() or entry.stem,
        family=metadata.family,
        variant=metadata.variant,
        dialect=metadata.source_format,
        kinds=adapter.kinds,
        trigger_words=_unique(map(to_printable, (*metadata.trigger_words, *entry.trigger_words))),
        learned_tokens=_unique(map(to_printable, adapter.tokens)),
        content_hash=record.hash if record and _SHA256.fullmatch(record.hash) else "",
        claims=_unique(claim for claim in claims if _SHA256.fullmatch(claim)),
    )


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


@dataclass(frozen=True, kw_only=True)
class _Sidecar:
    """The contents of the JSON file next to an adapter."""

    words: tuple[str, ...] = ()
    weight: float | None = None
    range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def _read_sidecar(file: Path) -> _Sidecar:
    """Read trigger words and weights from the JSON file that A1111 and Forge write next to an adapter.

    Other tools write different JSON files under the same name, so missing keys are not an error.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = to_printable(str(error))[:80]
        note = f"{file.name} cannot be read as JSON ({reason}); its trigger words and weight are ignored"
        return _Sidecar(notes=(note,))
    if not is_object(table):
        return _Sidecar()
    text, weight = table.get("activation text"), _finite_or_none(table.get("preferred weight"))
    words = (word.strip() for word in to_printable(text).split(",")) if isinstance(text, str) else ()
    return _Sidecar(
        words=_unique(word for word in words if word),
        weight=weight or None,
        range=_parse_range(table.get("weight range")),
    )


def _parse_range(value: object) -> tuple[float, float] | None:
    """Return a JSON value as a range if it is a list of two increasing finite numbers."""
    if not is_array(value) or len(value) != 2:
        return None
    least, most = map(_finite_or_none, value)
    return (least, most) if least is not None and most is not None and least < most else None


def _finite_or_none(value: object) -> float | None:
    """Return a JSON value as a float if it is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None
