"""Hash the bytes of a file, with and without the cache."""

import hashlib
import os
from pathlib import Path

import pytest

from lora_diffusion.core.atomic_files import file_hash, prefixed_file_hash, whole_and_tail_hash
from tests.helpers.library_files import in_place


@pytest.mark.parametrize("start", [0, 3, 8, 9])
def test_the_hash_covers_the_bytes_from_start(start: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    expected = hashlib.sha256(b"12345678"[start:]).hexdigest()
    assert file_hash(path, start=start) == file_hash(str(path), start=start, use_cache=False) == expected


@pytest.mark.parametrize("start", [0, 3, 8, 9])
def test_the_hashes_of_a_whole_file_and_its_tail_are_computed_together(start: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert whole_and_tail_hash(str(path), start) == (file_hash(path), file_hash(path, start=start))


def test_a_prefix_is_hashed_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert prefixed_file_hash(str(path), b"ab") == hashlib.sha256(b"ab12345678").hexdigest()


def test_a_changed_file_has_a_new_hash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    before = file_hash(path)
    path.write_bytes(b"after")
    os.utime(path, ns=(0, 0))
    assert file_hash(path) == file_hash(path, use_cache=False) != before


def test_without_the_cache_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    before = file_hash(path)
    in_place(path, b"change")
    assert file_hash(path) == before
    assert file_hash(path, use_cache=False) == hashlib.sha256(b"change").hexdigest()


def test_a_missing_file_raises_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        file_hash(tmp_path / "missing")
