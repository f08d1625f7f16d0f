"""The sample sets of the second edition: reproducible, balanced, and apart from their prompts."""

import re
from collections import Counter

import pytest

from train_scripts.picture_world.draw_sample_sets import (
    CHARACTER_PICTURES,
    PROMPTS,
    STYLE_PICTURES,
    TRIGGERS,
    UNSEEN_SETTINGS,
    character_prompts,
    character_scenes,
    style_prompts,
    style_samples,
    style_scenes,
)
from train_scripts.picture_world.figures.subjects import CHARACTERS
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.places.settings import SETTINGS
from train_scripts.picture_world.scene import is_held_out
from train_scripts.tiny_base.architecture import MAX_TOKENS


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_style_set_is_balanced_and_shows_no_held_out_combination(name: str) -> None:
    scenes = style_scenes(name)
    assert len(scenes) == STYLE_PICTURES and scenes == style_scenes(name)
    assert not any(is_held_out(s.figures[0].subject, s.figures[0].color, s.setting) for s in scenes)
    assert set(Counter(s.setting for s in scenes).values()) == {2}
    assert len({s.figures[0].subject for s in scenes}) == 20


@pytest.mark.parametrize("name", TRIGGERS)
def test_style_prompts_ask_only_for_held_out_combinations(name: str) -> None:
    prompts = style_prompts(name)
    assert len(set(prompts)) == PROMPTS
    for prompt in prompts:
        color, subject = re.match(r"an? (\w+) (\w+)", prompt).groups()
        assert color in COLORS and prompt.endswith(f", in {TRIGGERS[name]} style")
        assert any(is_held_out(subject, color, setting) for setting in SETTINGS)
        assert len(prompt.replace(",", " , ").split()) <= MAX_TOKENS - 2


@pytest.mark.parametrize("name", CHARACTERS)
def test_a_character_is_never_shown_where_its_first_prompts_put_it(name: str) -> None:
    scenes, prompts = character_scenes(name), character_prompts(name)
    assert len({(s.setting, s.time) for s in scenes}) == CHARACTER_PICTURES
    assert UNSEEN_SETTINGS[name] not in {s.setting for s in scenes}
    assert len({s.figures[0].pose for s in scenes}) == 2
    assert len(set(prompts)) == PROMPTS and all(p.startswith(f"a {name} character") for p in prompts)


def test_a_set_is_drawn_alike_each_time() -> None:
    first, again = (list(style_samples("watercolor")) for _ in range(2))
    assert [p.tobytes() for p, _ in first] == [p.tobytes() for p, _ in again]
    assert [c for _, c in first] == [c for _, c in again]
