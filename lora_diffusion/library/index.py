"""What is known of the adapters in a folder, kept in SQLite, so that a file is read once however often it is asked for.

The index lies in the user's cache folder, so that folders of adapters stay clean. It is a cache and nothing more: where
it is missing, damaged, of another version or cannot be written, the files are read again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Collection, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter
from tqdm import tqdm

from lora_diffusion.library.entry import AdapterLocation, LibraryEntry, read_entry, scan_folder

SCHEMA = 2
"""To be raised when the table or the meaning of a field changes; an index of another number is made anew."""
BUSY_SECONDS = 10
"""How long to wait for another process that writes the index."""
DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""SQLite's answers to a file that is no index of ours."""
ENTRY = TypeAdapter(LibraryEntry)


def refresh_index(folder: Path, index: Path) -> list[LibraryEntry]:
    """The adapters below a folder; those that have not changed since they were last read come from the index."""
    known = load_entries(index)
    entries: dict[str, LibraryEntry] = {}
    changed: dict[str, LibraryEntry] = {}
    places, refused = scan_folder(folder)
    try:
        for place in tqdm(places, desc="reading", unit="file", delay=1, leave=False, disable=None):
            old = known.get(place.relative)
            entry = refresh_entry(place, old)
            entries[place.relative] = entry
            if entry is not old and entry.stamp:
                changed[place.relative] = entry
    finally:  # what has been read is kept even if the user stops in the middle of it
        complete = len(entries) == len(places)
        save_entries(index, changed, known.keys() - entries.keys() if complete else ())
    return sorted([*entries.values(), *refused], key=lambda entry: entry.relative)


def refresh_entry(place: AdapterLocation, old: LibraryEntry | None) -> LibraryEntry:
    """The known entry if it still holds; else the file is read, and its hashes are kept if only a sidecar changed."""
    same_file = old is not None and old.stamp == place.stamp != ""
    if old is None or not same_file:
        return read_entry(place)
    if old.context != place.context:
        new = read_entry(place)
        content = new.content_hash or old.content_hash
        return replace(new, content_hash=content, payload_hash=old.payload_hash, file_hash=old.file_hash)
    return old if old.preview == place.preview else replace(old, preview=place.preview)


def index_file(folder: Path) -> Path:
    """Where the index of a folder lies."""
    given = [Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~/.cache"))]  # noqa: PTH111 (no error)
    cache_folder = next((path for path in given if path.is_absolute()), Path(tempfile.gettempdir()))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    return cache_folder / "lora_diffusion" / f"library-{digest[:16]}.sqlite"


def load_entries(index: Path) -> dict[str, LibraryEntry]:
    """The index's entries by relative path; none where it cannot be read in full, and a damaged one is removed."""
    if not index.is_file():
        return {}
    try:
        with closing(sqlite3.connect(index, timeout=BUSY_SECONDS)) as db:
            if read_schema(db) != SCHEMA:
                return {}
            rows = db.execute("SELECT path, entry FROM entries").fetchall()
        return {path: ENTRY.validate_json(text) for path, text in rows}
    except (sqlite3.Error, ValueError) as error:
        if is_damage(error):
            remove_index(index)
        return {}


def save_entries(index: Path, changed: Mapping[str, LibraryEntry], gone: Collection[str]) -> None:
    """Put entries into the index and take others out, all or none; a damaged index is begun anew.

    An index that cannot be written, because the disk is full, say, is left as it is: it saves time and decides nothing.
    """
    if not changed and not gone:
        return
    for _ in range(2):
        try:
            rows = [(path, ENTRY.dump_json(entry).decode()) for path, entry in changed.items()]
            index.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(index, timeout=BUSY_SECONDS, isolation_level=None)) as db:
                return write_rows(db, rows, gone)
        except sqlite3.Error as error:
            if not is_damage(error):
                return
            remove_index(index)
        except (OSError, ValueError):  # no folder for it, or a folder of adapters whose name is not valid UTF-8
            return


def is_damage(error: Exception) -> bool:
    """Whether it is the file's content that is wrong, rather than a lock, a full disk or a missing right."""
    return isinstance(error, ValueError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED


def remove_index(index: Path) -> None:
    """An index and its journal, which would be applied to the next one."""
    for path in (index, index.with_name(f"{index.name}-journal")):
        with suppress(OSError):
            path.unlink()


def write_rows(db: sqlite3.Connection, rows: Collection[tuple[str, str]], gone: Collection[str]) -> None:
    """One transaction; closing the connection before its end takes everything back."""
    db.execute("BEGIN IMMEDIATE")
    if read_schema(db) != SCHEMA:
        db.execute("DROP TABLE IF EXISTS entries")
        db.execute("CREATE TABLE entries (path TEXT PRIMARY KEY, entry TEXT NOT NULL) WITHOUT ROWID")
        db.execute(f"PRAGMA user_version = {SCHEMA}")
    db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", rows)
    db.executemany("DELETE FROM entries WHERE path = ?", [(path,) for path in gone])
    db.execute("COMMIT")


def read_schema(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
