"""A scene as a value: who is where, in what place, at what time; and how scenes are drawn at random.

Part of the combinations of subject, color and setting, and part of the pairs of subjects, are held out of all
training, to measure whether a model composes or remembers.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from train_scripts.picture_world.figures.props import PROPS
from train_scripts.picture_world.figures.subjects import CHARACTERS, SUBJECTS, Subject
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.places.light import TIMES
from train_scripts.picture_world.places.scenery import SEASONS
from train_scripts.picture_world.places.settings import SEASONAL, SETTINGS

Rng = np.random.Generator
SIDES = ("left", "middle", "right")
DISTANCES = ("near", "normal", "far")
DISTANCE_SHARES = (0.3, 0.4, 0.3)
RELATIONS = ("beside", "in front of")
PAIR_SHARE = 0.35
PROP_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One subject of a scene."""

    subject: str
    color: str
    pose: str = ""
    mirrored: bool = False
    prop: str = ""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is to be seen; everything that has no word, such as the places of clouds, follows from `seed`.

    Attributes:
        figures: One subject, or two from left to right; for "in front of" the first stands in front.
        side: Where a single subject stands.
        distance: How far away the figures are.
        relation: Of two figures, one of `RELATIONS`.
    """

    figures: tuple[Figure, ...]
    setting: str
    side: str = "middle"
    distance: str = "normal"
    relation: str = ""
    time: str = "day"
    weather: str = "clear"
    season: str = "summer"
    seed: int = 0


def find_subject(name: str) -> Subject:
    return SUBJECTS.get(name) or CHARACTERS[name]


def is_held_out(subject: str, color: str, setting: str) -> bool:
    """Whether this combination never appears in training pictures (one in eight)."""
    return hashlib.sha256(f"{subject}/{color}/{setting}".encode()).digest()[0] < 32


def is_pair_held_out(first: str, second: str) -> bool:
    """Whether these two subjects never appear together in training pictures (one in eight)."""
    return hashlib.sha256("+".join(sorted((first, second))).encode()).digest()[0] < 32


def choose(rng: Rng, values, weights: tuple[float, ...] | None = None) -> str:
    return str(rng.choice(list(values), p=weights))


def random_figure(rng: Rng, setting: str, *, held_out: bool) -> Figure:
    """A figure whose combination with the setting is held out of training, or not."""
    while True:
        subject, color = choose(rng, SUBJECTS), choose(rng, COLORS)
        if is_held_out(subject, color, setting) == held_out:
            pose = choose(rng, SUBJECTS[subject].poses)
            return Figure(subject=subject, color=color, pose=pose, mirrored=bool(rng.integers(2)))


def random_weather(rng: Rng, setting: str, season: str) -> str:
    if setting == "moon":
        return "clear"
    if setting == "snow" or season == "winter":
        return choose(rng, ("clear", "cloudy", "snow"), (0.5, 0.2, 0.3))
    return choose(rng, ("clear", "cloudy", "rain"), (0.6, 0.2, 0.2))


def random_scene(rng: Rng, *, held_out: bool = False) -> Scene:
    """A scene of the training part of the world, or one whose first figure or whose pair is held out."""
    return random_pair(rng, held_out=held_out) if rng.random() < PAIR_SHARE else random_single(rng, held_out=held_out)


def random_single(rng: Rng, *, held_out: bool) -> Scene:
    setting = choose(rng, SETTINGS)
    figure = random_figure(rng, setting, held_out=held_out)
    prop = choose(rng, PROPS) if rng.random() < PROP_SHARE else ""
    if prop == "hat" and (SUBJECTS[figure.subject].hat is None or figure.pose == "walking"):
        prop = ""
    if prop and figure.pose in SUBJECTS[figure.subject].flies:
        prop = ""
    figure = Figure(**{**figure.__dict__, "prop": prop})
    return Scene(
        figures=(figure,),
        side=choose(rng, SIDES),
        distance=choose(rng, DISTANCES, DISTANCE_SHARES),
        **random_surroundings(rng, setting),
    )


def random_pair(rng: Rng, *, held_out: bool) -> Scene:
    while True:
        setting = choose(rng, SETTINGS)
        first, second = (random_figure(rng, setting, held_out=False) for _ in range(2))
        if first.subject != second.subject and is_pair_held_out(first.subject, second.subject) == held_out:
            break
    return Scene(
        figures=(first, second),
        relation=choose(rng, RELATIONS, (0.75, 0.25)),
        distance=choose(rng, DISTANCES, (0.2, 0.5, 0.3)),
        **random_surroundings(rng, setting),
    )


def random_surroundings(rng: Rng, setting: str) -> dict:
    """Setting, time, season, weather and seed."""
    season = choose(rng, SEASONS, (0.2, 0.4, 0.2, 0.2)) if setting in SEASONAL else "summer"
    return {
        "setting": setting,
        "time": "night" if setting == "moon" else choose(rng, TIMES, (0.5, 0.25, 0.25)),
        "season": season,
        "weather": random_weather(rng, setting, season),
        "seed": int(rng.integers(2**31)),
    }
