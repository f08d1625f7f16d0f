"""A scene of the picture world as a value, and how its shapes come about.

The vocabulary is closed: every word of SUBJECTS, COLOURS, SETTINGS, TIMES and WEATHERS is one token of the
embedded base's tokenizer. A part of the subject-colour-setting combinations is held out of training, to
measure whether the base composes or remembers.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from train_scripts.tiny_world.characters import CHARACTERS
from train_scripts.tiny_world.settings import (
    LIGHTS,
    SETTINGS,
    clouds,
    lights_in_the_sky,
    rain,
    sky_colours,
)
from train_scripts.tiny_world.shapes import Colour, Shape, place, tinted
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS

TIMES = ("day", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain")
SIZES = {"small": 0.46, "normal": 0.6, "big": 0.72}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is to be seen; `seed` draws the places of clouds, hills and the rest."""

    subject: str
    colour: str
    setting: str
    time: str = "day"
    weather: str = "clear"
    size: str = "normal"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A scene as shapes, back to front, ready for a style to draw."""

    sky: tuple[Colour, Colour]
    scenery: tuple[Shape, ...]
    subject: tuple[Shape, ...]
    weather: tuple[Shape, ...]


def is_held_out(subject: str, colour: str, setting: str) -> bool:
    """Whether this combination never appears in the base's training pictures (about one in eight)."""
    digest = hashlib.sha256(f"{subject}/{colour}/{setting}".encode()).digest()
    return digest[0] < 32


def random_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """A scene drawn at random from the training part of the world, or from the held-out part."""
    while True:
        subject, colour, setting = (str(rng.choice(list(k))) for k in (SUBJECTS, COLOURS, SETTINGS))
        if is_held_out(subject, colour, setting) == held_out:
            break
    return Scene(
        subject=subject,
        colour=colour,
        setting=setting,
        time=str(rng.choice(TIMES, p=(0.5, 0.25, 0.25))),
        weather=str(rng.choice(WEATHERS, p=(0.6, 0.2, 0.2))),
        size=str(rng.choice(list(SIZES), p=(0.15, 0.7, 0.15))),
        seed=int(rng.integers(2**31)),
    )


def figure(scene: Scene) -> list[Shape]:
    """The subject's shapes in its own box: one of the world's subjects, or a character with its own colours."""
    character: Callable[[], list[Shape]] | None = CHARACTERS.get(scene.subject)
    return character() if character else SUBJECTS[scene.subject](COLOURS[scene.colour])


def compose(scene: Scene) -> Picture:
    """The scene's shapes, placed and lit."""
    rng = np.random.default_rng(scene.seed)
    light = LIGHTS[scene.time]
    height = SIZES[scene.size] * float(rng.uniform(0.94, 1.06))
    bottom = min(0.96, 0.9 + float(rng.uniform(-0.02, 0.04)))
    if scene.subject in ("balloon", "rocket"):
        bottom -= float(rng.uniform(0.06, 0.12))
    subject = place(
        figure(scene),
        x=0.5 + float(rng.uniform(-0.08, 0.08)),
        bottom=bottom,
        height=height,
        mirrored=bool(rng.integers(2)),
    )
    sky_lights = lights_in_the_sky(scene.time, scene.weather, rng)
    cloud_shapes = clouds(scene.time, scene.weather, rng)
    scenery = tinted(SETTINGS[scene.setting](rng), light.scenery)
    return Picture(
        sky=sky_colours(scene.time, scene.weather),
        scenery=(*sky_lights, *cloud_shapes, *scenery),
        subject=tuple(tinted(subject, light.subject)),
        weather=tuple(rain(scene.weather, rng)),
    )
