"""The committed picture sets are what the script draws, have captions, and keep their prompts unseen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_scripts.draw_sample_sets import SETS, STYLE_PICTURES, TRIGGERS, write_set
from train_scripts.tiny_world.captions import PLACES
from train_scripts.tiny_world.characters import CHARACTERS
from train_scripts.tiny_world.scene import is_held_out
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS

SAMPLE_DATA = Path(__file__).parents[2] / "sample_data"


def folder_of(name: str) -> Path:
    return SAMPLE_DATA / SETS[name][0] / name


def captions_of(name: str) -> list[str]:
    return [path.read_text(encoding="utf-8").strip() for path in sorted(folder_of(name).glob("*.txt"))]


def prompts_of(name: str) -> list[str]:
    return (SAMPLE_DATA / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def combination_in(text: str) -> tuple[str, str, str]:
    """The subject, colour and setting that a style's caption names."""
    content = text.split(",")[0]
    _, colour, subject = content.split()[:3]
    assert colour in COLOURS
    assert subject in SUBJECTS
    (setting,) = (setting for setting, phrases in PLACES.items() if phrases[0] in content)
    return subject, colour, setting


@pytest.mark.parametrize("name", ["ink", "zuki"])
def test_the_script_draws_the_committed_set_again(name: str, tmp_path: Path) -> None:
    write_set(tmp_path, name)
    drawn = tmp_path / SETS[name][0] / name
    files = sorted(path.name for path in folder_of(name).iterdir())
    assert sorted(path.name for path in drawn.iterdir()) == files
    for file in files:
        if file.endswith(".txt"):
            assert (drawn / file).read_bytes() == (folder_of(name) / file).read_bytes()
            continue
        new, committed = (np.asarray(Image.open(folder / file)) for folder in (drawn, folder_of(name)))
        assert np.array_equal(new, committed), file
    prompts = tmp_path / "prompts" / f"{name}.txt"
    assert prompts.read_text(encoding="utf-8").splitlines() == prompts_of(name)


@pytest.mark.parametrize("name", SETS)
def test_every_picture_is_64_px_rgb_and_has_a_caption(name: str) -> None:
    pictures = sorted(folder_of(name).glob("*.png"))
    assert len(pictures) == (STYLE_PICTURES if name in TRIGGERS else 8)
    assert {p.stem for p in pictures} == {p.stem for p in folder_of(name).glob("*.txt")}
    for path in pictures:
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGB")
    assert all(captions_of(name))


@pytest.mark.parametrize("name", TRIGGERS)
def test_style_captions_end_with_the_trigger_and_name_no_held_out_combination(name: str) -> None:
    for caption in captions_of(name):
        assert caption.endswith(f", in {TRIGGERS[name]} style")
        assert not is_held_out(*combination_in(caption)), caption


@pytest.mark.parametrize("name", TRIGGERS)
def test_style_prompts_are_eight_held_out_combinations_with_the_trigger(name: str) -> None:
    prompts = prompts_of(name)
    assert len(set(prompts)) == 8
    for prompt in prompts:
        assert prompt.endswith(f", in {TRIGGERS[name]} style")
        assert is_held_out(*combination_in(prompt)), prompt


@pytest.mark.parametrize("name", CHARACTERS)
def test_subject_prompts_name_the_character_where_no_picture_shows_it(name: str) -> None:
    prompts, captions = prompts_of(name), captions_of(name)
    assert len(set(prompts)) == 8
    assert not set(prompts) & set(captions)
    assert all(text.startswith(f"a {name} character ") for text in [*prompts, *captions])
