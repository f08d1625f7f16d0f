"""The SQLite index of a library: caching, rebuilding when damaged, and concurrent use."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.cli import main
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.library.search import default_folder, find_adapter, find_by_hash, open_library
from tests.helpers.library_files import file_hash_of, kohya, native, payload_of, peft_folder
from tests.helpers.read_counter import count_bytes_read

pytestmark = pytest.mark.usefixtures("own_cache")


def test_reopening_a_library_reads_none_of_its_files(folder: Path) -> None:
    for i in range(200):
        native(folder / f"{i:03}.safetensors", name=f"adapter {i}")
    with count_bytes_read() as counter:
        first = open_library(folder)
    assert counter.bytes > 200
    with count_bytes_read() as counter:
        again = open_library(folder)
        assert find_adapter(again, "adapter 150").stem == "150"
    assert counter.bytes == 0
    assert again == first


def overwrite_the_file(index: Path) -> None:
    index.write_bytes(b"no database " * 1000)


def overwrite_the_second_page(index: Path) -> None:
    data = bytearray(index.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    index.write_bytes(data)


def change_the_schema_version(index: Path) -> None:
    with closing(sqlite3.connect(index)) as db:
        db.execute("DROP TABLE entries")
        db.execute("CREATE TABLE entries (something INTEGER)")
        db.execute("PRAGMA user_version = 999")
        db.commit()


def make_entries_invalid(index: Path) -> None:
    with closing(sqlite3.connect(index)) as db:
        db.execute("UPDATE entries SET entry = '{}'")
        db.commit()


def rename_the_table(index: Path) -> None:
    with closing(sqlite3.connect(index)) as db:
        db.execute("ALTER TABLE entries RENAME TO others")
        db.commit()


@pytest.mark.parametrize(
    "damage",
    [
        overwrite_the_file,
        overwrite_the_second_page,
        change_the_schema_version,
        make_entries_invalid,
        rename_the_table,
        Path.unlink,
    ],
)
def test_a_damaged_index_is_rebuilt(damage: Any, folder: Path) -> None:
    path = kohya(folder / "a.safetensors")
    library = open_library(folder)
    damage(library.index)
    assert open_library(folder) == library
    with closing(sqlite3.connect(library.index)) as db:
        assert db.execute("SELECT path FROM entries").fetchall() == [("a.safetensors",)]
    damage(library.index)
    assert find_by_hash(library, file_hash_of(path)) is not None
    assert find_by_hash(open_library(folder), file_hash_of(path)) is not None


def test_a_library_works_without_a_writable_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kohya(folder / "a.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path / "below a file"))
    library = open_library(folder)
    assert find_adapter(library, "a").path == path
    assert find_by_hash(library, file_hash_of(path)) is not None
    assert [p.name for p in folder.iterdir()] == ["a.safetensors"]


def test_names_that_are_not_valid_unicode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kohya(folder / "a.safetensors", ss_output_name="x-name")
    data = path.read_bytes().replace(b'"x-name"', b'"\\ud800"')
    path.write_bytes(data)
    assert open_library(folder) == open_library(folder)
    renamed = folder.rename(folder.with_name(os.fsdecode(b"odd\xff")))
    for _ in range(2):
        assert main(["library", str(renamed)]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith("?")


def test_the_index_is_in_the_cache_folder(folder: Path, tmp_path: Path) -> None:
    native(folder / "a.safetensors")
    library = open_library(folder)
    assert library.index.parent == tmp_path / "cache" / "lora_diffusion"
    assert [p.name for p in folder.iterdir()] == ["a.safetensors"]
    assert [p.name for p in library.index.parent.iterdir()] == [library.index.name]


def run_python(code: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True)


def test_reading_and_hashing_bytes_import_no_torch(folder: Path) -> None:
    native(folder / "a.safetensors", tokens={"<cat>": {"text_encoder": torch.ones(1, 768)}})
    path = kohya(folder / "b.safetensors", seed=1)
    peft_folder(folder / "c")
    (folder / "d.pt").write_bytes(b"pickled")
    (folder / "e.safetensors").write_bytes(b"damaged")
    code = (
        "import sys; from pathlib import Path\n"
        "from lora_diffusion.library.search import find_adapter, find_by_hash, open_library\n"
        "library = open_library(Path(sys.argv[1])); assert len(library.entries) == 5; find_adapter(library, 'a')\n"
        f"for digest in ({payload_of(path)[:12]!r}, {file_hash_of(path)[:10]!r}):\n"
        "    assert find_by_hash(library, digest).name == 'b'\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_python(code, folder)
    assert (done.communicate()[1], done.returncode) == ("", 0)


def test_processes_can_refresh_an_index_concurrently(folder: Path) -> None:
    for i in range(20):
        native(folder / f"{i}.safetensors")
    code = (
        "import os, sys; from pathlib import Path; from lora_diffusion.library.search import open_library\n"
        "for _ in range(20):\n"
        "    library = open_library(Path(sys.argv[1])); assert len(library.entries) == 20\n"
        "    assert not any(entry.problem for entry in library.entries)\n"
        "    [os.utime(entry.path) for entry in library.entries[:3]]"
    )
    running = [run_python(code, folder) for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in running] == [("", 0)] * 3
    with closing(sqlite3.connect(open_library(folder).index)) as db:
        assert db.execute("SELECT count(*) FROM entries").fetchone() == (20,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_command_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native(folder / "neon.safetensors", name="neon", tokens={"<glow>": {"text_encoder": torch.ones(1, 768)}})
    kohya(folder / "b.safetensors", ss_output_name="x\x1b[31m" + "y" * 60)
    (folder / "neon.json").write_text('{"preferred weight": 0.8}')
    assert main(["library", str(folder)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["name", "family", "kind", "weight", "triggers", "file"]
    assert " ".join(lines[1].split()) == "neon SD 1.x LoRA, textual inversion 0.8 sks, <glow> neon.safetensors"
    assert lines[0].startswith("x [31myyyy")
    assert len({line.index(cell) for line, cell in zip([title, *lines], ["file", "b.s", "neon.s"], strict=True)}) == 1
    assert main(["library", str(folder), "--search", "GLOW", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["path"], entry["preferred_weight"], entry["preview"]) == (str(folder / "neon.safetensors"), 0.8, None)
    assert main(["library", str(folder), "--family", "sdxl"]) == 0
    assert "no usable adapters found" in capsys.readouterr().out


def test_the_default_folder_comes_from_the_environment_or_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert default_folder() == sample_data_folder() / "adapters"
    assert main(["library"]) == 0
    assert "watercolour.safetensors" in capsys.readouterr().out
    shutil.copy(sample_data_folder() / "adapters" / "ink.safetensors", folder / "only.safetensors")
    monkeypatch.setenv("LORA_DIFFUSION_LIBRARY", str(folder))
    assert main(["library"]) == 0
    assert "only.safetensors" in capsys.readouterr().out
    for wrong, words in ((folder / "none", "no such folder"), (folder / "only.safetensors", "is a file")):
        assert main(["library", str(wrong)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
