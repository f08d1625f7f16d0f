"""Scenes to ask a model for, and other true renderings of what a plain caption says."""

from dataclasses import dataclass, replace

import numpy as np

from train_scripts.picture_world.captions import SIDE_WORDS, join_words, plain_caption, with_articles
from train_scripts.picture_world.scene import (
    DISTANCE_SHARES,
    DISTANCES,
    SIDES,
    Scene,
    choose,
    find_subject,
    random_pair,
    random_single,
)

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, the scene it was made from, and the group it is counted in."""

    prompt: str
    scene: Scene
    group: str


def vary_scene(scene: Scene, rng: Rng, *, keep_side: bool = False) -> Scene:
    """The scene with everything drawn anew that its plain caption does not name."""
    figures = tuple(
        replace(f, pose=choose(rng, find_subject(f.subject).poses), mirrored=bool(rng.integers(2)))
        for f in scene.figures
    )
    return replace(
        scene,
        figures=figures,
        side=scene.side if keep_side else choose(rng, SIDES),
        distance=choose(rng, DISTANCES, DISTANCE_SHARES),
        seed=int(rng.integers(2**31)),
    )


def without_prop(scene: Scene) -> Scene:
    return replace(scene, figures=tuple(replace(figure, prop="") for figure in scene.figures))


def beside(scene: Scene) -> Scene:
    return replace(scene, relation="beside")


def caption_with_side(scene: Scene) -> str:
    """The plain caption with the side of its single figure."""
    figure = scene.figures[0]
    noun = with_articles(f"a {figure.color} {figure.subject}")
    return plain_caption(scene).replace(noun, join_words(noun, SIDE_WORDS[scene.side]), 1)


def ask_questions(seed: int, *, singles: int = 480, pairs: int = 180, sides: int = 90) -> list[Question]:
    """Single figures and pairs, half of each held out of training, and single figures at a side."""
    rng = np.random.default_rng((41, seed))
    questions: list[Question] = []
    for i in range(singles):
        held_out = i % 2 == 1
        scene = without_prop(random_single(rng, held_out=held_out))
        group = "single, held out" if held_out else "single, seen"
        questions.append(Question(prompt=plain_caption(scene), scene=scene, group=group))
    for i in range(pairs):
        held_out = i % 2 == 1
        scene = beside(random_pair(rng, held_out=held_out))
        group = "pair, held out" if held_out else "pair, seen"
        questions.append(Question(prompt=plain_caption(scene), scene=scene, group=group))
    for _ in range(sides):
        scene = without_prop(random_single(rng, held_out=False))
        questions.append(Question(prompt=caption_with_side(scene), scene=scene, group="side"))
    return questions
