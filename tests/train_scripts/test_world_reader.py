"""The committed reader tells the world's subjects apart, and does not take a blob for one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_scripts.tiny_world.prompts import asked_scenes, full_caption
from train_scripts.tiny_world.reader import (
    NOTHING,
    Reading,
    WorldReader,
    load_reader,
    read,
    save_reader,
    scores,
    stacked,
    wilson,
)
from train_scripts.tiny_world.render import flat
from train_scripts.tiny_world.scene import Scene, compose, is_held_out
from train_scripts.tiny_world.spoilt import CRUDE, blurred
from train_scripts.tiny_world.styles import STYLES
from train_scripts.train_world_reader import any_scene

FOLDER = Path(__file__).parents[2] / "sample_data" / "tiny-world-reader"
SEED = 20_240  # unlike any that training or its measurements draw from


@pytest.fixture(scope="module")
def reader() -> WorldReader:
    return load_reader(FOLDER)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(SEED)
    return [any_scene(rng) for _ in range(150)]


@pytest.fixture(scope="module")
def renderings(scenes: list[Scene]) -> list[Image.Image]:
    return [flat(compose(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def readings(reader: WorldReader, renderings: list[Image.Image]) -> list[Reading]:
    return read(reader, renderings)


@pytest.mark.parametrize("head", ["subject", "colour", "setting"])
def test_reads_fresh_renderings(readings: list[Reading], scenes: list[Scene], head: str) -> None:
    assert scores(readings, scenes)[head]["accuracy"] >= 0.95


@pytest.mark.parametrize("style", STYLES)
def test_reads_subjects_in_the_styles_of_the_sample_data(reader: WorldReader, scenes: list[Scene], style: str) -> None:
    rng = np.random.default_rng(SEED + 2)
    readings = read(reader, [STYLES[style](compose(scene), rng) for scene in scenes[:40]])
    assert scores(readings, scenes[:40])["subject"]["accuracy"] >= 0.85


@pytest.mark.parametrize("kind", [kind for kind in CRUDE if kind != "halves"])  # the card has its figure
def test_calls_a_spoilt_subject_nothing(reader: WorldReader, scenes: list[Scene], kind: str) -> None:
    rng = np.random.default_rng(SEED + 1)
    readings = read(reader, [CRUDE[kind](scene, rng, flat) for scene in scenes[:40]])
    assert np.mean([reading.subject == NOTHING for reading in readings]) >= 0.85


def test_heavy_blur_lowers_confidence_in_the_subject(
    reader: WorldReader, readings: list[Reading], renderings: list[Image.Image]
) -> None:
    def confidence(answers: list[Reading]) -> float:
        return float(np.mean([a.subject_probability * (a.subject != NOTHING) for a in answers]))

    unclear = read(reader, [blurred(picture, 5) for picture in renderings[:60]])
    assert confidence(unclear) < confidence(readings[:60]) - 0.5


def test_reads_pictures_and_tensors_alike(reader: WorldReader, renderings: list[Image.Image]) -> None:
    pictures = renderings[:5]
    pairs = zip(read(reader, pictures, batch=2), read(reader, stacked(pictures)), strict=True)
    for a, b in pairs:
        assert (a.subject, a.colour, a.setting, a.time) == (b.subject, b.colour, b.setting, b.time)
        assert a.subject_probability == pytest.approx(b.subject_probability, abs=1e-3)


def test_saved_reader_reads_the_same(reader: WorldReader, renderings: list[Image.Image], tmp_path: Path) -> None:
    save_reader(reader, tmp_path)
    assert read(load_reader(tmp_path), renderings[:5]) == read(reader, renderings[:5])
    assert (tmp_path / "model.safetensors").stat().st_size < 800_000


def test_asked_scenes_are_half_held_out_and_named_in_full() -> None:
    asked = asked_scenes(48, seed=3)
    held = [is_held_out(s.subject, s.colour, s.setting) for s, _ in asked]
    assert held == [False, True] * 24
    assert all(scene.colour in prompt and scene.subject in prompt for scene, prompt in asked)
    assert asked == asked_scenes(48, seed=3)


def test_full_caption_names_place_time_and_weather() -> None:
    scene = Scene(subject="boat", colour="orange", setting="city", time="night", weather="rain")
    rng = np.random.default_rng(0)
    for caption in [full_caption(scene, rng) for _ in range(20)]:
        assert "orange boat" in caption
        assert "a orange" not in caption
        assert "city" in caption
        assert "night" in caption or "stars" in caption
        assert "rain" in caption


def test_wilson_interval_against_a_known_value() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
