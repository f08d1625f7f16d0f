"""The judge's arithmetic: what counts as right, what varies between true renderings, and what its measures see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from train_scripts.picture_world.captions import plain_caption
from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.scene import Figure, Scene, is_held_out, is_pair_held_out, random_pair, random_scene
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.known_styles import render_neon
from train_scripts.tiny_judge.labels import expect_answers, left_to_right
from train_scripts.tiny_judge.prompts import ask_questions, vary_scene
from train_scripts.tiny_judge.reader import HEADS, MALFORMED_SUBJECT, NONE, PictureReader, Reading, stack_pictures
from train_scripts.tiny_judge.scoring import has_bindings, has_subjects, score_questions
from train_scripts.tiny_judge.statistics import share_of, wilson_interval
from train_scripts.tiny_judge.style_measure import (
    build_reference,
    combine_groups,
    detail_features,
    frechet_distance,
    pairwise_distance,
    palette_features,
    style_progress,
)

SEEDS = st.integers(0, 2**32 - 1)


def reading(**answers: str) -> Reading:
    base = {"subject": "cat", "color": "red", "second_subject": NONE, "second_color": "red", "setting": "beach"}
    return Reading(answers={**base, "side": "left", **answers}, probabilities={})


def cat_and_dog() -> Scene:
    figures = (Figure(subject="cat", color="red", pose="sitting"), Figure(subject="dog", color="blue", pose="walking"))
    return Scene(figures=figures, setting="beach", relation="beside")


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_varied_scene_has_the_same_plain_caption(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    assert plain_caption(vary_scene(scene, rng)) == plain_caption(scene)


def test_questions_are_what_their_groups_say() -> None:
    questions = ask_questions(0, singles=20, pairs=10, sides=10)
    assert questions == ask_questions(0, singles=20, pairs=10, sides=10)
    for question in questions:
        figures, held_out = question.scene.figures, question.group.endswith("held out")
        if question.group.startswith("single"):
            assert is_held_out(figures[0].subject, figures[0].color, question.scene.setting) == held_out
        if question.group.startswith("pair"):
            assert is_pair_held_out(*(f.subject for f in figures)) == held_out
        if question.group == "side":
            assert any(words in question.prompt for words in ("on the left", "in the middle", "on the right"))
        assert all(figure.color in question.prompt and figure.subject in question.prompt for figure in figures)


def test_two_subjects_count_in_any_order_but_each_with_its_color() -> None:
    figures = cat_and_dog().figures
    right = reading(subject="dog", color="blue", second_subject="cat", second_color="red")
    swapped = reading(subject="dog", color="red", second_subject="cat", second_color="blue")
    alone = reading(subject="cat")
    assert has_subjects(right, figures) and has_bindings(right, figures)
    assert has_subjects(swapped, figures) and not has_bindings(swapped, figures)
    assert not has_subjects(alone, figures)
    assert (right.count, alone.count, reading(subject=MALFORMED_SUBJECT).count) == (2, 1, 0)


def test_scores_are_shares_by_group() -> None:
    questions = [q for q in ask_questions(1, singles=8, pairs=0, sides=0) if q.group == "single, seen"]
    readings = [
        reading(subject=q.scene.figures[0].subject, color=q.scene.figures[0].color, setting=q.scene.setting)
        for q in questions
    ]
    readings[0] = replace(readings[0], answers={**readings[0].answers, "subject": MALFORMED_SUBJECT})
    table = score_questions(readings, questions)["single, seen"]
    assert (table["subject"]["right"], table["subject"]["count"]) == (len(questions) - 1, len(questions))
    assert table["color"]["share"] == 1  # given that the subject is right
    assert table["all"]["right"] == len(questions) - 1


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_labels_name_figures_from_left_to_right(seed: int) -> None:
    scene = random_pair(np.random.default_rng(seed), held_out=False)
    drawing = compose(scene)
    first, second = left_to_right(scene, drawing)
    answers = expect_answers(scene, drawing).answers
    assert (answers["subject"], answers["second_subject"]) == (first.subject, second.subject)
    assert answers["side"] is None
    assert len(expect_answers(scene, drawing).numbers()) == len(HEADS)


def test_styles_without_color_ask_for_none() -> None:
    scene = replace(cat_and_dog(), figures=cat_and_dog().figures[:1])
    answers = expect_answers(scene, compose(scene), "ink").answers
    assert answers["color"] is None and answers["time"] is None and answers["subject"] == "cat"


def test_wilson_interval_of_known_cases() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(95, 100)  # Newcombe 1998, method 3
    assert (round(low, 3), round(high, 3)) == (0.888, 0.978)
    assert share_of([True, False])["share"] == 0.5


def test_frechet_distance_is_zero_for_the_same_set_and_the_squared_shift_for_a_moved_one() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 6))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 2) == pytest.approx(6 * 4, rel=1e-3)
    assert pairwise_distance(features[:30] * 3) == pytest.approx(3 * pairwise_distance(features[:30]))


def neon_pictures() -> tuple[list[Image.Image], list[Image.Image], list[Image.Image], list[Image.Image]]:
    """Neon tubes, the same with filled areas, blurred, and noise of the same colors."""
    rng = np.random.default_rng(3)
    drawings = [compose(random_scene(rng)) for _ in range(8)]
    tubes = [render_neon(d, rng) for d in drawings]
    fills = [Image.blend(render_flat(d), Image.new("RGB", (128, 128), (14, 12, 28)), 0.45) for d in drawings]
    blurred = [p.filter(ImageFilter.GaussianBlur(3)) for p in tubes]
    noise = [Image.fromarray(rng.permutation(np.asarray(p).reshape(-1, 3)).reshape(128, 128, 3)) for p in tubes]
    return tubes, fills, blurred, noise


def test_detail_features_tell_lines_from_blur_and_noise() -> None:
    tubes, _, blurred, noise = (detail_features(stack_pictures(p)).mean(dim=0) for p in neon_pictures())
    assert (blurred[:3] < tubes[:3]).all() and (tubes[:3] < noise[:3]).all()


def test_palette_features_are_shares_under_a_square_root() -> None:
    features = palette_features(stack_pictures([Image.new("RGB", (128, 128), "red"), Image.new("RGB", (128, 128))]))
    assert features.square().sum(dim=1) == pytest.approx(torch.ones(2))
    assert float((features[0] - features[1]).norm()) > 1


def test_a_group_cannot_make_up_for_another() -> None:
    assert combine_groups([torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([3.0])]).item() == 1.5
    assert combine_groups([torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0])]).item() == 1


def test_true_renderings_cover_the_way_to_a_style_and_fills_blur_and_noise_do_not() -> None:
    """With the features of an untrained reader: palette and detail decide."""
    torch.manual_seed(0)
    reader, rng = PictureReader().eval(), np.random.default_rng(5)
    scenes = [random_scene(np.random.default_rng(k)) for k in range(8)]
    styled = [[render_neon(compose(vary_scene(s, rng)), rng) for _ in range(3)] for s in scenes]
    flat = [[render_flat(compose(vary_scene(s, rng))) for _ in range(3)] for s in scenes]
    reference = build_reference(reader, styled, flat)
    base = [render_flat(compose(vary_scene(s, rng))) for s in scenes]
    true = [render_neon(compose(vary_scene(s, rng)), rng) for s in scenes]
    _, fills, _, noise = neon_pictures()
    readable = [True] * 8
    progress = {
        name: style_progress(reference, reader, pictures, base, readable)
        for name, pictures in {
            "true": true,
            "base": base,
            "fills": fills,
            "blurred": [p.filter(ImageFilter.GaussianBlur(3)) for p in true],
            "noise": noise,
        }.items()
    }
    assert progress["true"] > 0.8
    assert progress["base"] == pytest.approx(0, abs=1e-6)
    assert max(progress["fills"], progress["blurred"], progress["noise"]) < progress["true"] - 0.15, progress
    assert style_progress(reference, reader, true, base, [False] * 8) <= 0.05
