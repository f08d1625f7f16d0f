"""A folder of adapters: found by name and by hash, read once, and nothing in it passed over in silence."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.adapter import Adapter, AdapterMetadata, adapter_hash
from lora_diffusion.cli import main
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.files import sample_data
from lora_diffusion.formats.native import save_adapter
from lora_diffusion.formats.reading import load_adapter
from lora_diffusion.formats.safetensors_file import read_header
from lora_diffusion.layers import LoRALayer
from lora_diffusion.library import Library, default_folder, find, find_by_hash, open_library, search
from lora_diffusion.library_entry import LibraryEntry

MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = f"lora_unet_{MODULE.replace('.', '_')}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_DIFFUSION_LIBRARY", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, 768, generator=rng), torch.randn(640, 1, generator=rng)


def native(path: Path, *, name: str = "", seed: int = 0, **more: Any) -> Path:
    """A file of ours with one layer for SD 1.x, and with what else is asked for."""
    down, up = factors(seed)
    adapter = Adapter(
        layers={f"unet.{MODULE}": LoRALayer(down=down, up=up, alpha=1.0)},
        metadata=AdapterMetadata(name=name, family="sd1", trigger_words=("sks",)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(replace(adapter, **more), path)
    return path


def kohya(path: Path, *, seed: int = 0, **entries: str) -> Path:
    """A file as kohya's trainer writes it."""
    down, up = factors(seed)
    tensors = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.alpha": torch.tensor(1.0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=entries)
    return path


def peft_folder(path: Path, *, alpha: float = 1.0) -> Path:
    down, up = factors(7)
    path.mkdir(parents=True)
    keys = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
    save_file(dict(zip(keys, (down, up), strict=True)), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": alpha}))
    return path


def payload_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()[read_header(path).data_start :]).hexdigest()


def file_hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def by_path(library: Library) -> dict[str, LibraryEntry]:
    return {entry.relative: entry for entry in library.entries}


def in_place(path: Path, data: bytes) -> None:
    """Other bytes in a file, of the same length and with the same time: nobody could know without reading it."""
    stat = path.stat()
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_every_kind_of_file_is_listed_with_what_its_header_says(folder: Path) -> None:
    vectors = torch.ones(2, 768)
    native(folder / "one.safetensors", name="mine", tokens={"<cat>": {"text_encoder": vectors}})
    kohya(folder / "deep" / "er" / "two.safetensors", ss_output_name="theirs", ss_base_model_version="sd_v1")
    peft_folder(folder / "run.v1.5")
    save_file({"<dog>": vectors}, folder / "dog.safetensors")
    torch.save({"a": vectors}, folder / "old.pt")
    (folder / ".hidden.safetensors").write_bytes(b"half")
    (folder / "readme.txt").write_text("no adapter")
    found = by_path(open_library(folder))
    assert list(found) == ["deep/er/two.safetensors", "dog.safetensors", "old.pt", "one.safetensors", "run.v1.5"]
    two, dog, old, one, run = found.values()
    assert (one.name, one.family, one.dialect, one.learned_tokens) == ("mine", "sd1", "native", ("<cat>",))
    assert (one.kinds, one.trigger_words) == (("LoRA", "textual inversion"), ("sks",))
    assert one.content_hash == adapter_hash(load_adapter(one.path))
    assert (two.name, two.family, two.dialect, two.content_hash) == ("theirs", "sd1", "kohya", "")
    assert (dog.learned_tokens, dog.kinds) == (("<dog>",), ("textual inversion",))
    assert (old.name, old.kinds, old.bytes, old.problem) == ("old", ("pickled",), old.path.stat().st_size, "")
    assert (run.name, run.path, run.dialect) == ("run.v1.5", folder / "run.v1.5", "peft")
    assert not any(entry.problem for entry in found.values())
    assert all(entry.path.is_absolute() for entry in found.values())


def test_sidecars_and_previews(folder: Path) -> None:
    for name in ("plain", "off", "broken", "other"):
        native(folder / f"{name}.safetensors")
    (folder / "plain.json").write_text('{"activation text": "zwx, sks,, glow ", "preferred weight": 0.7}')
    (folder / "off.json").write_text('{"activation text": "", "preferred weight": 0}')
    (folder / "broken.json").write_text("{")
    (folder / "other.json").write_text('["of another tool"]')
    (folder / "plain.preview.png").touch()
    (folder / "off.webp").touch()
    plain, off, broken, other = (find(open_library(folder), name) for name in ("plain", "off", "broken", "other"))
    assert (plain.trigger_words, plain.preferred_weight) == (("sks", "zwx", "glow"), 0.7)
    assert (plain.preview, off.preview, other.preview) == (folder / "plain.preview.png", folder / "off.webp", None)
    assert (off.preferred_weight, off.trigger_words, other.notes) == (None, ("sks",), ())
    assert "broken.json cannot be read as JSON" in broken.notes[0]


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("styles/neon.safetensors", "styles/neon.safetensors"),
        ("styles/neon", "styles/neon.safetensors"),
        ("neon", "styles/neon.safetensors"),
        ("NEON", "styles/neon.safetensors"),
        ("bright lights", "styles/neon.safetensors"),
        ("Bright Lights", "styles/neon.safetensors"),
        ("./ink.safetensors", "ink.safetensors"),
        ("blot", "ink-step2.safetensors"),  # a file's name comes before the name in another's header
        ("ink-step2", "ink-step2.safetensors"),
    ],
)
def test_names(name: str, relative: str, folder: Path) -> None:
    native(folder / "styles" / "neon.safetensors", name="bright lights")
    native(folder / "ink.safetensors", name="ink-step2")
    native(folder / "ink-step2.safetensors", name="blot")
    assert find(open_library(folder), name).relative == relative


def test_a_name_of_several_is_refused_with_their_paths(folder: Path) -> None:
    native(folder / "neon.safetensors", name="last")
    native(folder / "old" / "neon.safetensors", name="last")
    library = open_library(folder)
    for name in ("neon", "last", "LAST"):
        with pytest.raises(ConfigError, match=r"means 2 adapters in .*: neon\.safetensors, old/neon\.safetensors;"):
            find(library, name)
    assert find(library, "old/neon").relative == "old/neon.safetensors"
    assert find(library, "neon.safetensors").relative == "neon.safetensors"


def test_an_unknown_name_is_refused_with_the_nearest(folder: Path) -> None:
    native(folder / "neon.safetensors", name="Bright Lights")
    library = open_library(folder)
    with pytest.raises(ConfigError, match=rf"^no adapter called 'neno' in {folder}; did you mean 'neon'\?$"):
        find(library, "neno")
    with pytest.raises(ConfigError, match="did you mean 'Bright Lights'"):
        find(library, "bright light")
    with pytest.raises(ConfigError, match="lists the 1 that are there"):
        find(library, "qqq")


def test_files_that_cannot_be_used_stay_visible(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native(folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-5])
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    save_file({"model.layers.0.weight": torch.ones(2, 2)}, folder / "llm.safetensors")
    (folder / os.fsdecode(b"bad\xff.safetensors")).write_bytes(b"")
    os.mkfifo(folder / "pipe.safetensors")
    os.mkfifo(folder / "good.json")
    found = {entry.stem: entry.problem for entry in open_library(folder).entries}
    assert len(found) == 6
    assert "cut short" in found["cut"]
    assert found["gone"].endswith("is it a link to nowhere?")
    assert "no file" in found["pipe"]
    assert "none of its 1 tensors is in a known layout" in found["llm"]
    assert "not valid UTF-8" in found[os.fsdecode(b"bad\xff")]
    with pytest.raises(AdapterFormatError, match="cut short"):
        find(open_library(folder), "cut")
    assert main(["library", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (out.count("\nproblem: "), out.count("\n")) == (5, 7)
    assert not find(open_library(folder), "good").problem


def test_links_in_a_ring_are_looked_at_once(folder: Path) -> None:
    native(folder / "inner" / "neon.safetensors")
    (folder / "inner" / "again").symlink_to(folder)
    assert list(by_path(open_library(folder))) == ["inner/neon.safetensors"]


def test_only_what_has_changed_is_read_again(folder: Path) -> None:
    for name in ("still", "moved", "edited", "deleted"):
        native(folder / f"{name}.safetensors")
    before = by_path(open_library(folder))
    for name in ("still", "moved", "edited"):
        path = folder / f"{name}.safetensors"
        in_place(path, b"\0" * path.stat().st_size)  # whoever reads it now finds no adapter
    (folder / "moved.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "deleted.safetensors").unlink()
    os.utime(folder / "edited.safetensors")
    native(folder / "new.safetensors", name="new")
    after = by_path(open_library(folder))
    assert after["still.safetensors"] == before["still.safetensors"]
    assert after["edited.safetensors"].problem
    assert after["elsewhere.safetensors"].problem
    assert after["new.safetensors"].name == "new"
    assert set(after) == {f"{name}.safetensors" for name in ("still", "edited", "elsewhere", "new")}


def test_what_lies_beside_a_file_is_noticed_and_its_hashes_stay_known(folder: Path) -> None:
    path = kohya(folder / "a.safetensors")
    found = find_by_hash(open_library(folder), adapter_hash(load_adapter(path)))
    assert found is not None
    (folder / "a.json").write_text('{"preferred weight": 0.5}')
    (folder / "a.png").touch()
    entry = find(open_library(folder), "a")
    assert (entry.preferred_weight, entry.preview) == (0.5, folder / "a.png")
    assert (entry.content_hash, entry.file_hash) == (found.content_hash, file_hash_of(path))
    (folder / "a.json").unlink()
    (folder / "a.png").unlink()
    assert find(open_library(folder), "a") == replace(found, context=found.context)


def test_a_new_alpha_beside_peft_tensors_is_another_adapter(folder: Path) -> None:
    path = peft_folder(folder / "run")
    first = adapter_hash(load_adapter(path))
    assert find_by_hash(open_library(folder), first[:12]) is not None
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 20.0}')
    library = open_library(folder)
    assert find_by_hash(library, first[:12]) is None
    assert find_by_hash(library, adapter_hash(load_adapter(path))) is not None


def test_a_renamed_file_is_found_by_each_of_its_hashes(folder: Path) -> None:
    ours, theirs = native(folder / "ours.safetensors", seed=1), kohya(folder / "theirs.safetensors", seed=2)
    pickled = folder / "old.pt"
    torch.save(load_file(theirs), pickled)
    native(folder / "other.safetensors", seed=3)
    open_library(folder)
    (folder / "sub").mkdir()
    digests: list[tuple[str, str]] = []
    for path in (ours, theirs, pickled):
        moved = path.rename(folder / "sub" / f"renamed-{path.name}")
        digests.append((file_hash_of(moved)[:10].upper(), moved.name))
    for path in (folder / "sub" / "renamed-ours.safetensors", folder / "sub" / "renamed-theirs.safetensors"):
        digests += [(payload_of(path)[:12], path.name), (f"0x{adapter_hash(load_adapter(path))}", path.name)]
    for digest, name in digests:
        for _ in range(2):
            found = find_by_hash(open_library(folder), digest)
            assert found is not None
            if name == "renamed-theirs.safetensors" and digest.startswith("0x"):
                assert found.path.name in (name, "renamed-old.pt")  # the same tensors
            else:
                assert found.path.name == name


def test_no_hash_is_taken_from_a_claim(folder: Path) -> None:
    wanted = kohya(folder / "true.safetensors", seed=1)
    digest = payload_of(wanted)
    kohya(folder / "liar.safetensors", seed=2, sshs_model_hash=digest)
    found = find_by_hash(open_library(folder), digest[:12])
    assert found is not None
    assert found.path == wanted
    wanted.unlink()
    assert find_by_hash(open_library(folder), digest[:12]) is None


def test_a_claim_says_where_to_look_first(folder: Path) -> None:
    wanted = kohya(folder / "z.safetensors", seed=1)
    digest = payload_of(wanted)
    kohya(wanted, seed=1, sshs_model_hash=digest)
    kohya(folder / "a.safetensors", seed=2)
    assert find_by_hash(open_library(folder), digest) is not None
    found = by_path(open_library(folder))
    assert (found["z.safetensors"].payload_hash, found["a.safetensors"].file_hash) == (digest, "")


def test_edited_metadata_does_not_change_content_and_payload(folder: Path) -> None:
    path = kohya(folder / "a.safetensors", ss_output_name="before")
    content, payload, whole = adapter_hash(load_adapter(path)), payload_of(path), file_hash_of(path)
    for digest in (content, payload, whole):
        assert find_by_hash(open_library(folder), digest) is not None
    save_file(load_file(path), path, metadata={"ss_output_name": "after", "ss_training_comment": "edited"})
    library = open_library(folder)
    assert library.entries[0].name == "after"
    for digest in (content, payload):
        assert find_by_hash(library, digest) == find(open_library(folder), "after")
    assert find_by_hash(library, whole) is None


def test_a_known_hash_is_answered_from_the_index_alone(folder: Path) -> None:
    path = kohya(folder / "a.safetensors")
    digest = payload_of(path)
    library = open_library(folder)
    first = find_by_hash(library, digest)
    in_place(path, b"\0" * path.stat().st_size)
    assert find_by_hash(library, digest) == first == find_by_hash(open_library(folder), digest)
    os.utime(path)
    assert find_by_hash(library, digest) is None  # it has changed since the library was opened


def test_what_only_loading_shows_is_kept_as_the_problem(folder: Path) -> None:
    save_file(
        {
            f"{KOHYA}.lora_down.weight": torch.full((1, 768), float("nan")),
            f"{KOHYA}.lora_up.weight": torch.ones(640, 1),
        },
        folder / "nan.safetensors",
    )
    (folder / "evil.pt").write_bytes(b"no pickle at all")
    library = open_library(folder)
    assert [entry.problem for entry in library.entries] == ["", ""]
    assert find_by_hash(library, "0123456789") is None
    problems = [entry.problem for entry in open_library(folder).entries]
    assert "is no pickle" in problems[0]
    assert "NaN" in problems[1]


@pytest.mark.parametrize("digest", ["", "abc", "neon", "0123456", "g" * 10, "0" * 65])
def test_a_digest_must_be_one(digest: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="8 to 64 hexadecimal digits"):
        find_by_hash(open_library(folder), digest)


def test_search_by_words_and_family(folder: Path) -> None:
    native(folder / "styles" / "Neon.safetensors", name="bright")
    kohya(folder / "ink.safetensors", **{"modelspec.trigger_phrase": "drawn in ink"})
    library = open_library(folder)
    assert [entry.stem for entry in search(library, "STYLES brig")] == ["Neon"]
    assert [entry.stem for entry in search(library, "drawn")] == ["ink"]
    assert len(search(library, "", family="sd1")) == 2
    assert search(library, "", family="sdxl") == search(library, "neon ink") == ()
    with pytest.raises(ConfigError, match="choose one of sd1"):
        search(library, "", family="flux")


def test_the_second_look_at_200_adapters_takes_no_time(folder: Path) -> None:
    for i in range(200):
        native(folder / f"{i:03}.safetensors", name=f"adapter {i}")
    first = open_library(folder)
    started = time.process_time()
    again = open_library(folder)
    assert time.process_time() - started < 0.2
    assert again == first
    started = time.process_time()
    assert find(again, "adapter 150").stem == "150"
    assert time.process_time() - started < 0.05


def damage_nothing_but_bytes(index: Path) -> None:
    index.write_bytes(b"no database " * 1000)


def damage_a_page(index: Path) -> None:
    data = bytearray(index.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    index.write_bytes(data)


def make_older(index: Path) -> None:
    with closing(sqlite3.connect(index)) as db:
        db.execute("DROP TABLE entries")
        db.execute("CREATE TABLE entries (something INTEGER)")
        db.execute("PRAGMA user_version = 999")
        db.commit()


def make_wrong(index: Path) -> None:
    with closing(sqlite3.connect(index)) as db:
        db.execute("UPDATE entries SET entry = '{}'")
        db.commit()


def make_another_table(index: Path) -> None:
    with closing(sqlite3.connect(index)) as db:
        db.execute("ALTER TABLE entries RENAME TO others")
        db.commit()


@pytest.mark.parametrize(
    "spoil", [damage_nothing_but_bytes, damage_a_page, make_older, make_wrong, make_another_table, Path.unlink]
)
def test_a_spoilt_index_is_made_anew(spoil: Any, folder: Path) -> None:
    path = kohya(folder / "a.safetensors")
    library = open_library(folder)
    spoil(library.index)
    assert open_library(folder) == library
    with closing(sqlite3.connect(library.index)) as db:
        assert db.execute("SELECT path FROM entries").fetchall() == [("a.safetensors",)]
    spoil(library.index)
    assert find_by_hash(library, file_hash_of(path)) is not None
    assert find_by_hash(open_library(folder), file_hash_of(path)) is not None


def test_without_a_place_for_the_index_it_works_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kohya(folder / "a.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path / "below a file"))
    library = open_library(folder)
    assert find(library, "a").path == path
    assert find_by_hash(library, file_hash_of(path)) is not None
    assert [p.name for p in folder.iterdir()] == ["a.safetensors"]


def test_a_folder_and_a_header_that_no_encoding_can_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kohya(folder / "a.safetensors", ss_output_name="x-name")
    data = path.read_bytes().replace(b'"x-name"', b'"\\ud800"')
    path.write_bytes(data)
    assert open_library(folder) == open_library(folder)
    odd = folder.rename(folder.with_name(os.fsdecode(b"odd\xff")))
    for _ in range(2):
        assert main(["library", str(odd)]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith("?")


def test_the_index_lies_in_the_cache_and_nothing_in_the_folder(folder: Path, tmp_path: Path) -> None:
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
        "import sys; from pathlib import Path; from lora_diffusion.library import find, find_by_hash, open_library\n"
        "library = open_library(Path(sys.argv[1])); assert len(library.entries) == 5; find(library, 'a')\n"
        f"for digest in ({payload_of(path)[:12]!r}, {file_hash_of(path)[:10]!r}):\n"
        "    assert find_by_hash(library, digest).name == 'b'\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_python(code, folder)
    assert (done.communicate()[1], done.returncode) == ("", 0)


def test_processes_that_refresh_at_once_do_not_disturb_each_other(folder: Path) -> None:
    for i in range(20):
        native(folder / f"{i}.safetensors")
    code = (
        "import os, sys; from pathlib import Path; from lora_diffusion.library import open_library\n"
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


def test_the_command_takes_its_folder_from_the_environment_or_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert default_folder() == sample_data() / "adapters"
    assert main(["library"]) == 0
    assert "watercolour.safetensors" in capsys.readouterr().out
    shutil.copy(sample_data() / "adapters" / "ink.safetensors", folder / "only.safetensors")
    monkeypatch.setenv("LORA_DIFFUSION_LIBRARY", str(folder))
    assert main(["library"]) == 0
    assert "only.safetensors" in capsys.readouterr().out
    for wrong, words in ((folder / "none", "no such folder"), (folder / "only.safetensors", "is a file")):
        assert main(["library", str(wrong)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
