"""What `dataset check` finds in a folder, and the sheet that it draws."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from lora_diffusion.cli import main
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.data.duplicates import difference_hash, find_near_duplicates


def drawing(seed: int, size: int = 80) -> Image.Image:
    """A few boxes, other ones for each seed."""
    picture = Image.new("RGB", (size, size), (40 * (seed % 6), 90, 200))
    draw = ImageDraw.Draw(picture)
    for i in range(4):
        x, y = (seed * 37 + i * 29) % 50, (seed * 53 + i * 17) % 50
        draw.rectangle((x, y, x + 12 + seed % 9, y + 20), fill=((seed * 91 + i * 60) % 256, i * 70, seed * 13 % 256))
    return picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    for i in range(4):
        drawing(i).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"number {i} in sks style")
    return place


@given(st.integers(0, 200))
def test_scaling_and_compressing_hardly_move_a_hash_and_other_pictures_do(seed: int) -> None:
    picture, other = drawing(seed, 96), drawing(seed + 1, 96)
    smaller = picture.resize((64, 64), Image.Resampling.LANCZOS)
    assert (difference_hash(picture) ^ difference_hash(smaller)).bit_count() <= 6
    assert difference_hash(picture) == difference_hash(picture.copy())
    assert difference_hash(picture) != difference_hash(other)


def test_twins_are_pairs_within_the_distance() -> None:
    hashes = {Path("a"): 0b0000, Path("b"): 0b0001, Path("c"): 0b0111}
    assert find_near_duplicates(hashes, 1) == ((Path("a"), Path("b")),)
    assert find_near_duplicates(hashes, 2) == ((Path("a"), Path("b")), (Path("b"), Path("c")))


def test_a_clean_folder_has_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "check", str(sample_data_folder() / "styles" / "neon"), "--trigger", "zwx"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "20 images, 20 samples per epoch; 20 as 64x64",
        "no problems found",
    ]


def test_what_may_go_wrong_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing(2).save(folder / "twin.png", compress_level=1)
    (folder / "twin.txt").write_text("the same again, in sks style")
    (folder / "0.txt").write_text("sks " * 90)
    (folder / "1.txt").write_text("no trigger \\(here\\)")
    drawing(9).resize((30, 60)).save(folder / "small.png")
    (folder / "small.txt").write_text("a small one, sks")
    command = ["dataset", "check", str(folder), "--trigger", "sks"]
    assert main([*command, "--json", "--sheet", str(tmp_path / "sheet.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {
        key: [Path(path).name for path in found[key]]
        for key in ("upscaled", "long_captions", "without_trigger", "with_prompt_syntax")
    }
    assert names == {
        "upscaled": ["small.png"],
        "long_captions": ["0.png"],
        "without_trigger": ["1.png"],
        "with_prompt_syntax": ["1.png"],
    }
    assert [[Path(path).name for path in pair] for pair in found["duplicates"]] == [["2.png", "twin.png"]]
    assert sum(found["buckets"].values()) == found["images"] == 6
    assert main(command) == 0
    text = capsys.readouterr().out
    for words in (
        "near duplicates: 2.png and twin.png",
        "will be upscaled: small.png",
        "split into 3 chunks: 0.png",
        "trigger word: 1.png",
        "captions.weights: 1.png",
    ):
        assert words in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 180
    assert main(["dataset", "check", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
