"""The committed reader tells the world's subjects apart, and does not take a blob for one."""

from pathlib import Path

import numpy as np
import pytest

from train_scripts.tiny_world.prompts import asked_scenes, full_caption
from train_scripts.tiny_world.reader import (
    CRUDE,
    NOTHING,
    WorldReader,
    blurred,
    load_reader,
    read,
    save_reader,
    scores,
    stacked,
    wilson,
)
from train_scripts.tiny_world.render import flat
from train_scripts.tiny_world.scene import Scene, compose, is_held_out
from train_scripts.train_world_reader import any_scene

FOLDER = Path(__file__).parents[1] / "sample_data" / "tiny-world-reader"
SEED = 20_240  # unlike any that training or its measurements draw from


@pytest.fixture(scope="module")
def reader() -> WorldReader:
    return load_reader(FOLDER)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(SEED)
    return [any_scene(rng) for _ in range(150)]


@pytest.mark.parametrize("head", ["subject", "colour", "setting"])
def test_reads_fresh_renderings(reader: WorldReader, scenes: list[Scene], head: str) -> None:
    readings = read(reader, [flat(compose(scene)) for scene in scenes])
    assert scores(readings, scenes)[head]["accuracy"] >= 0.95


@pytest.mark.parametrize("kind", [kind for kind in CRUDE if kind != "halves"])  # the card has its figure
def test_calls_a_spoilt_subject_nothing(reader: WorldReader, scenes: list[Scene], kind: str) -> None:
    rng = np.random.default_rng(SEED + 1)
    readings = read(reader, [CRUDE[kind](scene, rng) for scene in scenes[:60]])
    assert np.mean([reading.subject == NOTHING for reading in readings]) >= 0.85


def test_heavy_blur_lowers_confidence_in_the_subject(reader: WorldReader, scenes: list[Scene]) -> None:
    sharp = [flat(compose(scene)) for scene in scenes[:60]]
    clear, unclear = read(reader, sharp), read(reader, [blurred(p, 5) for p in sharp])
    confident = [
        np.mean([reading.subject_probability * (reading.subject != NOTHING) for reading in readings])
        for readings in (clear, unclear)
    ]
    assert confident[1] < confident[0] - 0.5


def test_reads_pictures_and_tensors_alike(reader: WorldReader, scenes: list[Scene]) -> None:
    pictures = [flat(compose(scene)) for scene in scenes[:5]]
    pairs = zip(read(reader, pictures, batch=2), read(reader, stacked(pictures)), strict=True)
    for a, b in pairs:
        assert (a.subject, a.colour, a.setting, a.time) == (b.subject, b.colour, b.setting, b.time)
        assert a.subject_probability == pytest.approx(b.subject_probability, abs=1e-3)


def test_saved_reader_reads_the_same(reader: WorldReader, scenes: list[Scene], tmp_path: Path) -> None:
    save_reader(reader, tmp_path)
    pictures = [flat(compose(scene)) for scene in scenes[:5]]
    assert read(load_reader(tmp_path), pictures) == read(reader, pictures)
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
