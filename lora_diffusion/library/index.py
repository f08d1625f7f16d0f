"""Cache the entries of a library in an SQLite file, so that unchanged adapters are not read again.

The index is in the user's cache folder (`$XDG_CACHE_HOME/lora_diffusion` or `~/.cache/lora_diffusion`). It is only a
cache: if it is missing, damaged, written by another version or not writable, the adapters are read again.
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

_SCHEMA = 2
"""Version of the table and of the entries; increase it when either changes. Other versions are rebuilt."""
_BUSY_SECONDS = 10
"""How long to wait for another process that is writing the index."""
_DAMAGE_CODES = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""SQLite error codes that mean that the file is not a valid index."""
ENTRY = TypeAdapter(LibraryEntry)
"""Converts library entries to and from JSON."""


def refresh_index(folder: str | os.PathLike[str], index: str | os.PathLike[str]) -> list[LibraryEntry]:
    """List the adapters below a folder, and read those that are not in the index or have changed.

    Args:
        folder: The library's folder.
        index: The SQLite file, which is updated.

    Returns:
        Entries sorted by relative path, including files that cannot be used.
    """
    known = load_entries(index)
    entries: dict[str, LibraryEntry] = {}
    changed: dict[str, LibraryEntry] = {}
    locations, refused = scan_folder(folder)
    try:
        for location in tqdm(locations, desc="reading", unit="file", delay=1, leave=False, disable=None):
            old = known.get(location.relative)
            entry = _refresh_entry(location, old)
            entries[location.relative] = entry
            if entry is not old and entry.stamp:
                changed[location.relative] = entry
    finally:  # saves the entries read so far if the user interrupts the scan
        complete = len(entries) == len(locations)
        save_entries(index, changed, known.keys() - entries.keys() if complete else ())
    return sorted([*entries.values(), *refused], key=lambda entry: entry.relative)


def _refresh_entry(location: AdapterLocation, old: LibraryEntry | None) -> LibraryEntry:
    """Return the indexed entry if it is up to date, or else read the file.

    The computed hashes are kept if only the sidecar or the version of this package has changed.
    """
    same_file = old is not None and old.stamp == location.stamp != ""
    if old is None or not same_file:
        return read_entry(location)
    if old.context != location.context:
        new = read_entry(location)
        content = new.content_hash or old.content_hash
        return replace(new, content_hash=content, payload_hash=old.payload_hash, file_hash=old.file_hash)
    return old if old.preview == location.preview else replace(old, preview=location.preview)


def index_file(folder: str | os.PathLike[str]) -> Path:
    """Return the path of the index of a library's folder, in the user's cache folder."""
    candidates = [Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~/.cache"))]  # noqa: PTH111 (no error)
    cache_folder = next((path for path in candidates if path.is_absolute()), Path(tempfile.gettempdir()))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    return cache_folder / "lora_diffusion" / f"library-{digest[:16]}.sqlite"


def load_entries(index: str | os.PathLike[str]) -> dict[str, LibraryEntry]:
    """Read the entries of an index, by relative path.

    Returns:
        An empty dictionary if the index is missing, unreadable or of another version. A damaged index is deleted.
    """
    index = Path(index)
    if not index.is_file():
        return {}
    try:
        with closing(sqlite3.connect(index, timeout=_BUSY_SECONDS)) as db:
            if _read_schema(db) != _SCHEMA:
                return {}
            rows = db.execute("SELECT path, entry FROM entries").fetchall()
        return {path: ENTRY.validate_json(text) for path, text in rows}
    except (sqlite3.Error, ValueError) as error:
        if _is_damage(error):
            _remove_index(index)
        return {}


def save_entries(index: str | os.PathLike[str], changed: Mapping[str, LibraryEntry], gone: Collection[str]) -> None:
    """Write entries to the index and delete others, in one transaction.

    A damaged index is rebuilt. Errors such as a full disk are ignored, because the index is only a cache.

    Args:
        index: The SQLite file.
        changed: The entries to insert or replace, by relative path.
        gone: Relative paths of the entries to delete.
    """
    if not changed and not gone:
        return
    index = Path(index)
    for _ in range(2):
        try:
            rows = [(path, ENTRY.dump_json(entry).decode()) for path, entry in changed.items()]
            index.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(index, timeout=_BUSY_SECONDS, isolation_level=None)) as db:
                return _write_rows(db, rows, gone)
        except sqlite3.Error as error:
            if not _is_damage(error):
                return
            _remove_index(index)
        except (OSError, ValueError):  # the cache folder cannot be made, or a path is not valid UTF-8
            return


def _is_damage(error: Exception) -> bool:
    """Return whether an error means invalid contents, rather than a lock, a full disk or missing permissions."""
    return isinstance(error, ValueError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE_CODES


def _remove_index(index: Path) -> None:
    """Delete an index and its journal; SQLite would apply the journal to the next index."""
    for path in (index, index.with_name(f"{index.name}-journal")):
        with suppress(OSError):
            path.unlink()


def _write_rows(db: sqlite3.Connection, rows: Collection[tuple[str, str]], gone: Collection[str]) -> None:
    """Insert and delete rows in one transaction, which closing the connection early rolls back."""
    db.execute("BEGIN IMMEDIATE")
    if _read_schema(db) != _SCHEMA:
        db.execute("DROP TABLE IF EXISTS entries")
        db.execute("CREATE TABLE entries (path TEXT PRIMARY KEY, entry TEXT NOT NULL) WITHOUT ROWID")
        db.execute(f"PRAGMA user_version = {_SCHEMA}")
    db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", rows)
    db.executemany("DELETE FROM entries WHERE path = ?", [(path,) for path in gone])
    db.execute("COMMIT")


def _read_schema(db: sqlite3.Connection) -> int:
    """Return the version number that the index was written with."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])
