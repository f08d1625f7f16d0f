"""Adapters found in a library by name, words and hash; unusable files are listed with their problem."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.adapters.adapter import adapter_hash
from lora_diffusion.cli import main
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.library.search import find_adapter, find_by_hash, open_library, search, with_file_hashes
from tests.helpers.library_files import (
    KOHYA,
    MODULE,
    by_path,
    file_hash_of,
    in_place,
    kohya,
    native,
    payload_of,
    peft_folder,
)
from tests.helpers.read_counter import count_bytes_read

pytestmark = pytest.mark.usefixtures("own_cache")


def test_every_kind_of_file_is_listed_with_its_metadata(folder: Path) -> None:
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
    plain, off, broken, other = (
        find_adapter(open_library(folder), name) for name in ("plain", "off", "broken", "other")
    )
    assert (plain.trigger_words, plain.preferred_weight) == (("sks", "zwx", "glow"), 0.7)
    assert (plain.preview, off.preview, other.preview) == (folder / "plain.preview.png", folder / "off.webp", None)
    assert (off.preferred_weight, off.trigger_words, other.notes) == (None, ("sks",), ())
    assert "broken.json cannot be read as JSON" in broken.notes[0]


def test_the_hashes_of_a_file_take_one_pass_over_it(folder: Path) -> None:
    path = native(folder / "one.safetensors", biases={f"unet.{MODULE}": torch.ones(100_000)})
    entry = find_adapter(open_library(folder), "one")
    with count_bytes_read() as counter:
        hashed = with_file_hashes(entry)
    assert (hashed.file_hash, hashed.payload_hash) == (file_hash_of(path), payload_of(path))
    assert counter.bytes < 1.1 * path.stat().st_size


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
def test_an_adapter_is_found_by_each_of_its_names(name: str, relative: str, folder: Path) -> None:
    native(folder / "styles" / "neon.safetensors", name="bright lights")
    native(folder / "ink.safetensors", name="ink-step2")
    native(folder / "ink-step2.safetensors", name="blot")
    assert find_adapter(open_library(folder), name).relative == relative


def test_an_ambiguous_name_is_refused_with_the_paths(folder: Path) -> None:
    native(folder / "neon.safetensors", name="last")
    native(folder / "old" / "neon.safetensors", name="last")
    library = open_library(folder)
    for name in ("neon", "last", "LAST"):
        with pytest.raises(ConfigError, match=r"matches 2 adapters in .*: neon\.safetensors, old/neon\.safetensors;"):
            find_adapter(library, name)
    assert find_adapter(library, "old/neon").relative == "old/neon.safetensors"
    assert find_adapter(library, "neon.safetensors").relative == "neon.safetensors"


def test_an_unknown_name_is_refused_with_a_suggestion(folder: Path) -> None:
    native(folder / "neon.safetensors", name="Bright Lights")
    library = open_library(folder)
    with pytest.raises(ConfigError, match=rf"^no adapter called 'neno' in {folder}; did you mean 'neon'\?$"):
        find_adapter(library, "neno")
    with pytest.raises(ConfigError, match="did you mean 'Bright Lights'"):
        find_adapter(library, "bright light")
    with pytest.raises(ConfigError, match="lists all 1 adapters"):
        find_adapter(library, "qqq")


def test_unusable_files_are_listed_with_their_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native(folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-5])
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    save_file({"model.layers.0.weight": torch.ones(2, 2)}, folder / "llm.safetensors")
    (folder / os.fsdecode(b"bad\xff.safetensors")).write_bytes(b"")
    os.mkfifo(folder / "pipe.safetensors")
    os.mkfifo(folder / "good.json")
    found = {entry.stem: entry.problem for entry in open_library(folder).entries}
    assert len(found) == 6
    assert "truncated" in found["cut"]
    assert found["gone"].endswith("whether it is a broken link")
    assert "not a readable file" in found["pipe"]
    assert "none of its 1 keys is in a known format" in found["llm"]
    assert "not valid UTF-8" in found[os.fsdecode(b"bad\xff")]
    with pytest.raises(AdapterFormatError, match="truncated"):
        find_adapter(open_library(folder), "cut")
    assert main(["library", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (out.count("\nproblem: "), out.count("\n")) == (5, 7)
    assert not find_adapter(open_library(folder), "good").problem


def test_cyclic_links_are_scanned_once(folder: Path) -> None:
    native(folder / "inner" / "neon.safetensors")
    (folder / "inner" / "again").symlink_to(folder)
    assert list(by_path(open_library(folder))) == ["inner/neon.safetensors"]


def test_only_changed_files_are_read_again(folder: Path) -> None:
    for name in ("still", "moved", "edited", "deleted"):
        native(folder / f"{name}.safetensors")
    before = by_path(open_library(folder))
    for name in ("still", "moved", "edited"):
        path = folder / f"{name}.safetensors"
        in_place(path, b"\0" * path.stat().st_size)  # reading it again would fail
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


def test_a_new_sidecar_is_read_and_known_hashes_are_kept(folder: Path) -> None:
    path = kohya(folder / "a.safetensors")
    found = find_by_hash(open_library(folder), adapter_hash(load_adapter(path)))
    assert found is not None
    (folder / "a.json").write_text('{"preferred weight": 0.5}')
    (folder / "a.png").touch()
    entry = find_adapter(open_library(folder), "a")
    assert (entry.preferred_weight, entry.preview) == (0.5, folder / "a.png")
    assert (entry.content_hash, entry.file_hash) == (found.content_hash, file_hash_of(path))
    (folder / "a.json").unlink()
    (folder / "a.png").unlink()
    assert find_adapter(open_library(folder), "a") == replace(found, context=found.context)


def test_a_new_alpha_in_a_peft_config_changes_the_hash(folder: Path) -> None:
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


def test_a_hash_claimed_in_a_header_is_not_trusted(folder: Path) -> None:
    wanted = kohya(folder / "true.safetensors", seed=1)
    digest = payload_of(wanted)
    kohya(folder / "liar.safetensors", seed=2, sshs_model_hash=digest)
    found = find_by_hash(open_library(folder), digest[:12])
    assert found is not None
    assert found.path == wanted
    wanted.unlink()
    assert find_by_hash(open_library(folder), digest[:12]) is None


def test_files_that_claim_a_hash_are_hashed_first(folder: Path) -> None:
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
        assert find_by_hash(library, digest) == find_adapter(open_library(folder), "after")
    assert find_by_hash(library, whole) is None


def test_a_known_hash_is_answered_from_the_index_alone(folder: Path) -> None:
    path = kohya(folder / "a.safetensors")
    digest = payload_of(path)
    library = open_library(folder)
    first = find_by_hash(library, digest)
    in_place(path, b"\0" * path.stat().st_size)
    assert find_by_hash(library, digest) == first == find_by_hash(open_library(folder), digest)
    os.utime(path)
    assert find_by_hash(library, digest) is None  # the file has changed since the library was opened


def test_a_problem_found_while_loading_is_recorded(folder: Path) -> None:
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
    assert "is not a pickled file" in problems[0]
    assert "NaN" in problems[1]


@pytest.mark.parametrize("path_type", [str, Path])
def test_a_library_is_opened_by_a_string_or_a_path(path_type: Callable[[Path], str | Path], folder: Path) -> None:
    native(folder / "neon.safetensors")
    library = open_library(path_type(folder))
    assert library.folder == folder
    assert find_adapter(library, "neon").path == folder / "neon.safetensors"


@pytest.mark.parametrize("digest", ["", "abc", "neon", "0123456", "g" * 10, "0" * 65])
def test_an_invalid_digest_is_refused(digest: str, folder: Path) -> None:
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[-3, 3]", (-3.0, 3.0)), ("[1, 1]", None), ("[0]", None), ('["a", 1]', None), ("[0, 1e999]", None), ("7", None)],
)
def test_a_weight_range_is_read_if_it_is_valid(tmp_path: Path, text: str, expected: object) -> None:
    shutil.copy(sample_data_folder() / "adapters" / "neon.safetensors", tmp_path)
    (tmp_path / "neon.json").write_text(f'{{"weight range": {text}, "preferred weight": 0.5}}')
    (entry,) = open_library(tmp_path).entries
    assert (entry.weight_range, entry.preferred_weight) == (expected, 0.5)
