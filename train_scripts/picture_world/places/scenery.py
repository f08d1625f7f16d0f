"""Trees, hills and other scenery that several settings share, in the colors of a season."""

from dataclasses import dataclass

import numpy as np

from train_scripts.picture_world.palette import WHITE, WOOD
from train_scripts.picture_world.shapes import Color, Point, Shape, blob, box, darken, ellipse, lighten, line, polygon

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Season:
    """Colors of grass and leaves."""

    grass: Color
    leaves: Color
    accents: tuple[Color, ...] = ()
    """Blossoms in the grass, or fallen leaves."""
    snow: bool = False


SEASONS: dict[str, Season] = {
    "spring": Season(grass=(140, 206, 96), leaves=(250, 178, 206), accents=((252, 150, 190), (255, 236, 120), WHITE)),
    "summer": Season(grass=(98, 186, 84), leaves=(56, 146, 72)),
    "autumn": Season(
        grass=(190, 170, 86), leaves=(236, 126, 44), accents=((224, 90, 40), (240, 176, 60), (170, 84, 44))
    ),
    "winter": Season(grass=(238, 244, 250), leaves=(86, 132, 116), snow=True),
}


def draw_ground(horizon: float, color: Color, *, wave: float = 0.0, rng: Rng | None = None) -> Shape:
    """Everything below the horizon, lighter in the distance."""
    lift = [0.0, 0.0, 0.0] if rng is None else [float(v) for v in rng.uniform(-wave, wave, 3)]
    points = [(-0.1, 1.1), (-0.1, horizon + lift[0]), (0.5, horizon + lift[1]), (1.1, horizon + lift[2]), (1.1, 1.1)]
    if wave:
        curve: list[Point] = [(-0.1, points[1][1])]
        for i in range(1, 13):
            t = i / 12
            y = (1 - t) ** 2 * points[1][1] + 2 * t * (1 - t) * points[2][1] + t**2 * points[3][1]
            curve.append((-0.1 + 1.2 * t, y))
        points = [(-0.1, 1.1), *curve, (1.1, 1.1)]
    return polygon(points, lighten(color, 0.12), fill_to=darken(color, 0.1), part="ground")


def draw_hill(x: float, base: float, width: float, height: float, color: Color) -> Shape:
    points = [
        (x - width, base + 0.05),
        (x - width * 0.5, base - height * 0.72),
        (x, base - height),
        (x + width * 0.5, base - height * 0.72),
        (x + width, base + 0.05),
    ]
    return blob(points, color, part="scenery")


def draw_round_tree(x: float, base: float, size: float, season: Season) -> list[Shape]:
    leaves = lighten(season.leaves, 0.7) if season.snow else season.leaves
    light = lighten(leaves, 0.22)
    return [
        box(x - size * 0.07, base - size * 0.45, x + size * 0.07, base, WOOD, part="scenery"),
        ellipse(x, base - size * 0.68, size * 0.3, size * 0.32, leaves, part="scenery"),
        ellipse(x - size * 0.08, base - size * 0.76, size * 0.15, size * 0.15, light, part="scenery", rim=False),
    ]


def draw_pine(x: float, base: float, size: float, *, snowy: bool, color: Color = (44, 112, 82)) -> list[Shape]:
    shapes = [box(x - size * 0.05, base - size * 0.2, x + size * 0.05, base, WOOD, part="scenery")]
    for low, wide, tall in ((0.14, 0.3, 0.42), (0.4, 0.23, 0.36), (0.62, 0.16, 0.36)):
        bottom, top = base - size * low, base - size * (low + tall)
        shapes.append(polygon([(x - size * wide, bottom), (x, top), (x + size * wide, bottom)], color, part="scenery"))
        if snowy:
            cap = [
                (x - size * wide * 0.5, top + size * tall * 0.5),
                (x, top),
                (x + size * wide * 0.5, top + size * tall * 0.5),
            ]
            shapes.append(polygon(cap, WHITE, part="scenery", rim=False))
    return shapes


def draw_mountain(x: float, base: float, width: float, height: float, color: Color) -> list[Shape]:
    peak = base - height
    cap = [
        (x - width * 0.3, peak + height * 0.3),
        (x, peak),
        (x + width * 0.3, peak + height * 0.3),
        (x + width * 0.12, peak + height * 0.24),
        (x, peak + height * 0.34),
        (x - width * 0.12, peak + height * 0.24),
    ]
    return [
        polygon([(x - width, base), (x, peak), (x + width, base)], color, part="scenery"),
        polygon(
            [(x, peak), (x + width, base), (x + width * 0.2, base)], darken(color, 0.16), part="scenery", rim=False
        ),
        polygon(cap, WHITE, part="scenery"),
    ]


def draw_palm(x: float, base: float, size: float, lean: float) -> list[Shape]:
    top = (x + lean * size, base - size)
    leaves = [
        blob(
            [
                top,
                (top[0] + dx * size * 0.5, top[1] - size * 0.1 + dy * size * 0.2),
                (top[0] + dx * size, top[1] + dy * size),
            ],
            (58, 158, 84),
            part="scenery",
        )
        for dx, dy in ((-0.5, 0.1), (0.5, 0.08), (-0.34, 0.34), (0.36, 0.34), (0.08, -0.28))
    ]
    return [
        line([(x, base), (x + lean * size * 0.3, base - size * 0.5), top], size * 0.12, WOOD, part="scenery"),
        *leaves,
    ]


def draw_cactus(x: float, base: float, size: float) -> list[Shape]:
    green = (66, 150, 92)
    return [
        line([(x, base), (x, base - size)], size * 0.26, green, part="scenery"),
        line(
            [(x, base - size * 0.45), (x + size * 0.33, base - size * 0.45), (x + size * 0.33, base - size * 0.72)],
            size * 0.17,
            green,
            smooth=False,
            part="scenery",
        ),
        line(
            [(x, base - size * 0.32), (x - size * 0.3, base - size * 0.32), (x - size * 0.3, base - size * 0.56)],
            size * 0.17,
            green,
            smooth=False,
            part="scenery",
        ),
    ]


def scatter_accents(horizon: float, colors: tuple[Color, ...], count: int, rng: Rng) -> list[Shape]:
    """Small dots on the ground: blossoms, leaves, pebbles."""
    if not colors:
        return []
    shapes = []
    for _ in range(count):
        x, y = float(rng.uniform(0.02, 0.98)), float(rng.uniform(horizon + 0.06, 0.98))
        size = 0.008 + 0.012 * (y - horizon)
        shapes.append(
            ellipse(x, y, size, size * 0.8, colors[int(rng.integers(len(colors)))], part="scenery", rim=False)
        )
    return shapes


def choose_x(rng: Rng, count: int) -> list[float]:
    """`count` positions from left to right, spread over the picture."""
    return [float((i + rng.uniform(0.1, 0.9)) / count) for i in range(count)]
