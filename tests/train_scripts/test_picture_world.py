"""The picture world draws what its captions say, keeps combinations back, and varies where no word binds it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train_scripts.picture_world.captions import STYLES, plain_caption, vocabulary, write_caption
from train_scripts.picture_world.compose import compose, without_figures
from train_scripts.picture_world.figures.props import PROPS
from train_scripts.picture_world.figures.subjects import CHARACTERS, SUBJECTS
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.places.settings import SETTINGS
from train_scripts.picture_world.scene import (
    SIDES,
    Figure,
    Scene,
    is_held_out,
    is_pair_held_out,
    random_pair,
    random_scene,
    random_single,
)
from train_scripts.picture_world.shapes import bounds
from train_scripts.picture_world.styles.adapter_styles import ADAPTER_STYLES
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.known_styles import KNOWN_STYLES
from train_scripts.tiny_base.architecture import MAX_TOKENS, new_tokenizer
from train_scripts.tiny_judge.malformed import MALFORMED, is_changed

SEEDS = st.integers(0, 2**32 - 1)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def pixel_spread(pictures: list[Image.Image]) -> float:
    """Mean root mean square difference between all pairs."""
    pixels = np.stack([np.asarray(p, dtype=np.float32).ravel() for p in pictures])
    pairs = [np.sqrt(((a - b) ** 2).mean()) for i, a in enumerate(pixels) for b in pixels[:i]]
    return float(np.mean(pairs))


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_a_scene_always_gives_the_same_picture(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed))
    assert render_flat(compose(scene)).tobytes() == render_flat(compose(scene)).tobytes()


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_training_scenes_hold_no_held_out_combination(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed))
    assert not any(is_held_out(f.subject, f.color, scene.setting) for f in scene.figures)
    if len(scene.figures) == 2:
        assert not is_pair_held_out(*(f.subject for f in scene.figures))


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_held_out_scenes_hold_a_held_out_combination(seed: int) -> None:
    rng = np.random.default_rng(seed)
    single, pair = random_single(rng, held_out=True), random_pair(rng, held_out=True)
    assert is_held_out(single.figures[0].subject, single.figures[0].color, single.setting)
    assert is_pair_held_out(*(f.subject for f in pair.figures))


def test_about_one_combination_in_eight_is_held_out() -> None:
    triples = [is_held_out(s, c, p) for s in SUBJECTS for c in COLORS for p in SETTINGS]
    names = list(SUBJECTS)
    pairs = [is_pair_held_out(a, b) for i, a in enumerate(names) for b in names[:i]]
    assert 0.09 < np.mean(triples) < 0.16
    assert 0.07 < np.mean(pairs) < 0.18


@given(SEEDS, st.sampled_from(list(STYLES)))
@settings(max_examples=300, deadline=None)
def test_every_caption_word_is_one_token_and_captions_fit(seed: int, style: str) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    words = set(vocabulary())
    for text in (write_caption(scene, rng, style=style), plain_caption(scene, style=style)):
        parts = text.replace(",", " , ").split()
        assert set(parts) <= words
        assert len(parts) <= MAX_TOKENS - 2


def test_the_tokenizer_has_one_token_for_every_word(tmp_path) -> None:
    tokenizer = new_tokenizer(vocabulary(), tmp_path)
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in vocabulary())


def test_full_captions_name_subject_color_and_setting() -> None:
    scene = Scene(figures=(Figure(subject="owl", color="orange", pose="flying"),), setting="farm", time="night")
    assert plain_caption(scene) == "an orange owl on a farm at night"


@pytest.mark.parametrize("subject", [*SUBJECTS, *CHARACTERS])
def test_a_single_figure_stands_where_the_scene_says(subject: str) -> None:
    pose = next(iter((SUBJECTS.get(subject) or CHARACTERS[subject]).poses))
    figure = Figure(subject=subject, color="red", pose=pose)
    for seed in range(6):
        middles = []
        for side in SIDES:
            drawing = compose(Scene(figures=(figure,), setting="meadow", side=side, distance="far", seed=seed))
            left, top, right, bottom = bounds(drawing.figures[0])
            assert left > -0.12 and right < 1.12 and top > -0.12 and bottom < 1.05
            middles.append((left + right) / 2)
        assert middles[0] < middles[1] < middles[2]


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_first_of_two_figures_stands_on_the_left_or_in_front(seed: int) -> None:
    scene = random_pair(np.random.default_rng(seed), held_out=False)
    drawing = compose(scene)
    if scene.relation == "in front of":
        assert drawing.order[-1] == 0
    else:
        first, second = (sum(bounds(shapes)[::2]) for shapes in drawing.figures)
        assert first < second


@pytest.mark.parametrize("style", [*KNOWN_STYLES, *ADAPTER_STYLES])
def test_every_style_draws_every_setting_unlike_the_flat_one(style: str) -> None:
    render = {**KNOWN_STYLES, **ADAPTER_STYLES}[style]
    for i, setting in enumerate(SETTINGS):
        scene = replace(scenes(1, seed=i)[0], setting=setting)
        drawing = compose(scene)
        picture = render(drawing, np.random.default_rng(0))
        again = render(compose(scene), np.random.default_rng(0))
        assert picture.size == (128, 128) and picture.tobytes() == again.tobytes()
        assert pixel_spread([picture, render_flat(drawing)]) > 8


@pytest.mark.parametrize("prop", PROPS)
def test_a_prop_is_seen(prop: str) -> None:
    bare = Scene(figures=(Figure(subject="cat", color="white", pose="sitting"),), setting="beach", seed=3)
    with_prop = replace(bare, figures=(replace(bare.figures[0], prop=prop),))
    assert is_changed(render_flat(compose(bare)), render_flat(compose(with_prop)))


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_figure_differs_from_the_true_one(kind: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        scene = random_single(rng, held_out=False)
        drawing = compose(scene)
        if not is_changed(render_flat(drawing), render_flat(without_figures(drawing))):
            continue  # black on black: nothing to be seen, nothing to be spoiled
        spoiled = MALFORMED[kind](scene, rng, render_flat)
        assert spoiled.size == (128, 128)
        assert spoiled.tobytes() != render_flat(drawing).tobytes()


def test_one_prompt_has_many_pictures() -> None:
    """What no word binds varies: a cat on a meadow by day is a different picture each time."""
    rng = np.random.default_rng(5)
    drawn = []
    while len(drawn) < 12:
        scene = random_single(rng, held_out=False)
        cat = replace(scene.figures[0], subject="cat", color="red", pose="sitting", prop="")
        drawn.append(replace(scene, figures=(cat,), setting="meadow", time="day", weather="clear", season="summer"))
    assert pixel_spread([render_flat(compose(scene)) for scene in drawn]) > 35
