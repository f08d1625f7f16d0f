"""Everything that can be the subject of a scene, with its poses and its size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from train_scripts.picture_world.figures import small_animals, things
from train_scripts.picture_world.figures.animals import SPECIES, draw_sitting, draw_walking
from train_scripts.picture_world.figures.characters import draw_gloop, draw_pim, draw_tok, draw_zuki
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.shapes import Color, Shape


@dataclass(frozen=True, kw_only=True)
class Subject:
    """How a subject is drawn.

    Attributes:
        poses: Drawing by the name of the pose; each takes the color.
        height: Height beside that of a cat.
        hat: Where a hat sits in the unit box: x, y and width, or None if the subject wears none.
        flies: Poses that are drawn in the air.
    """

    poses: dict[str, Callable[[Color], list[Shape]]]
    height: float = 1.0
    hat: tuple[float, float, float] | None = None
    flies: tuple[str, ...] = ()


def _quadruped(name: str, height: float, hat_y: float) -> Subject:
    species = SPECIES[name]
    poses = {"sitting": partial(draw_sitting, species), "walking": partial(draw_walking, species)}
    return Subject(poses=poses, height=height, hat=(0, hat_y, 0.3))


SUBJECTS: dict[str, Subject] = {
    "cat": _quadruped("cat", 1.0, 0.18),
    "dog": _quadruped("dog", 1.05, 0.18),
    "rabbit": _quadruped("rabbit", 1.0, 0.28),
    "fox": _quadruped("fox", 1.0, 0.18),
    "bear": _quadruped("bear", 1.2, 0.16),
    "elephant": _quadruped("elephant", 1.25, 0.16),
    "bird": Subject(
        poses={"standing": small_animals.draw_standing_bird, "flying": small_animals.draw_flying_bird},
        height=0.8,
        flies=("flying",),
    ),
    "owl": Subject(
        poses={"standing": small_animals.draw_owl, "flying": partial(small_animals.draw_owl, flying=True)},
        height=0.85,
        flies=("flying",),
        hat=(0, 0.13, 0.26),
    ),
    "penguin": Subject(
        poses={"standing": small_animals.draw_penguin, "waving": partial(small_animals.draw_penguin, waving=True)},
        height=0.95,
        hat=(0, 0.1, 0.26),
    ),
    "frog": Subject(
        poses={"sitting": small_animals.draw_frog, "jumping": partial(small_animals.draw_frog, jumping=True)},
        height=0.8,
    ),
    "turtle": Subject(
        poses={"walking": small_animals.draw_turtle, "hiding": partial(small_animals.draw_turtle, hiding=True)},
        height=0.82,
    ),
    "robot": Subject(
        poses={"standing": things.draw_robot, "waving": partial(things.draw_robot, waving=True)},
        height=1.1,
    ),
    "house": Subject(poses={"": things.draw_house, "tall": partial(things.draw_house, tall=True)}, height=1.35),
    "castle": Subject(poses={"": things.draw_castle, "open": partial(things.draw_castle, open_gate=True)}, height=1.4),
    "car": Subject(poses={"": things.draw_car, "long": partial(things.draw_car, van=True)}, height=1.0),
    "boat": Subject(poses={"": things.draw_boat, "steam": partial(things.draw_boat, steamer=True)}, height=1.1),
    "rocket": Subject(
        poses={"standing": things.draw_rocket, "flying": partial(things.draw_rocket, flying=True)},
        height=1.25,
        flies=("flying",),
    ),
    "balloon": Subject(
        poses={"": things.draw_balloon, "striped": partial(things.draw_balloon, striped=True)},
        height=1.25,
        flies=("", "striped"),
    ),
    "mushroom": Subject(
        poses={"": things.draw_mushroom, "twin": partial(things.draw_mushroom, twin=True)}, height=0.85
    ),
    "flower": Subject(poses={"": things.draw_flower, "tulip": partial(things.draw_flower, tulip=True)}, height=0.95),
}


def _character(
    still: Callable[[], list[Shape]], moving: Callable[[], list[Shape]], pose: str, height: float
) -> Subject:
    return Subject(poses={"": lambda _: still(), pose: lambda _: moving()}, height=height)


CHARACTERS: dict[str, Subject] = {
    "pim": _character(draw_pim, partial(draw_pim, waving=True), "waving", 1.15),
    "zuki": _character(draw_zuki, partial(draw_zuki, flying=True), "flying", 1.05),
    "tok": _character(draw_tok, partial(draw_tok, pouring=True), "steaming", 1.0),
    "gloop": _character(draw_gloop, partial(draw_gloop, waving=True), "waving", 1.05),
}
"""Never shown to the base; the color of the scene has no meaning for them."""


def draw_subject(name: str, pose: str, color: str) -> list[Shape]:
    """Shapes of a subject or character in its unit box."""
    subject = SUBJECTS.get(name) or CHARACTERS[name]
    return subject.poses[pose](COLORS.get(color, (128, 128, 128)))
