"""Things that a single subject can have with it: a hat, a ball, a toy balloon, a gift, an umbrella."""

import numpy as np

from train_scripts.picture_world.palette import COLORS, WHITE, WOOD
from train_scripts.picture_world.shapes import Color, Shape, blob, box, darken, ellipse, lighten, line, polygon

Rng = np.random.Generator
PROPS = ("hat", "ball", "balloon", "gift", "umbrella")
BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")


def draw_hat(x: float, y: float, width: float, color: Color) -> list[Shape]:
    """A party hat standing on (x, y)."""
    return [
        polygon([(x - width / 2, y), (x, y - width * 1.15), (x + width / 2, y)], color, part="prop"),
        line(
            [(x - width * 0.33, y - width * 0.35), (x + width * 0.33, y - width * 0.35)],
            width * 0.14,
            lighten(color, 0.6),
            part="prop",
            rim=False,
        ),
        ellipse(x, y - width * 1.15, width * 0.16, width * 0.16, WHITE, part="prop"),
    ]


def draw_ball(x: float, color: Color) -> list[Shape]:
    return [
        ellipse(x, 0.86, 0.13, 0.13, color, part="prop"),
        blob(
            [
                (x - 0.05, 0.735),
                (x + 0.06, 0.74),
                (x + 0.03, 0.86),
                (x + 0.06, 0.98),
                (x - 0.05, 0.985),
                (x - 0.02, 0.86),
            ],
            WHITE,
            part="prop",
            rim=False,
        ),
    ]


def draw_toy_balloon(x: float, color: Color) -> list[Shape]:
    return [
        line([(x - 0.04, 0.78), (x + 0.02, 0.5), (x, 0.26)], 0.014, (90, 84, 96), part="prop", rim=False),
        ellipse(x, 0.1, 0.13, 0.16, color, part="prop"),
        ellipse(x - 0.045, 0.04, 0.03, 0.045, lighten(color, 0.65), turn=20, part="prop", rim=False),
    ]


def draw_gift(x: float, color: Color) -> list[Shape]:
    ribbon = lighten(color, 0.75)
    return [
        box(x - 0.13, 0.76, x + 0.13, 0.98, color, part="prop"),
        box(x - 0.03, 0.76, x + 0.03, 0.98, ribbon, part="prop", rim=False),
        box(x - 0.15, 0.72, x + 0.15, 0.79, darken(color, 0.15), part="prop"),
        ellipse(x - 0.06, 0.69, 0.06, 0.035, ribbon, turn=20, part="prop"),
        ellipse(x + 0.06, 0.69, 0.06, 0.035, ribbon, turn=-20, part="prop"),
    ]


def draw_umbrella(x: float, color: Color) -> list[Shape]:
    canopy = blob(
        [
            (x - 0.3, 0.16),
            (x - 0.2, -0.04),
            (x, -0.12),
            (x + 0.2, -0.04),
            (x + 0.3, 0.16),
            (x + 0.1, 0.12),
            (x - 0.1, 0.12),
        ],
        color,
        part="prop",
    )
    rib = blob(
        [(x - 0.09, 0.12), (x - 0.04, -0.09), (x + 0.04, -0.09), (x + 0.09, 0.12)],
        lighten(color, 0.55),
        part="prop",
        rim=False,
    )
    return [line([(x, 0.1), (x, 0.8)], 0.024, WOOD, part="prop"), canopy, rib]


def draw_prop(name: str, hat_place: tuple[float, float, float] | None, rng: Rng) -> list[Shape]:
    """The prop in the unit box of its figure."""
    color = COLORS[str(rng.choice(BRIGHT))]
    side = 0.5 if rng.random() < 0.5 else -0.5
    if name == "hat":
        if hat_place is None:
            raise ValueError("this subject wears no hat; choose another prop")
        return draw_hat(*hat_place, color)
    draw = {"ball": draw_ball, "balloon": draw_toy_balloon, "gift": draw_gift, "umbrella": draw_umbrella}[name]
    return draw(side, color)
