"""Where a scene takes place: sky by time of day and weather, and the ground with its landmarks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from train_scripts.tiny_world.shapes import (
    Colour,
    Shape,
    box,
    curve,
    darken,
    ellipse,
    lighten,
    mix,
    polygon,
    stroke,
)

HORIZON = 0.66
Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Light:
    """What a time of day does to the colours."""

    sky: tuple[Colour, Colour]
    """Top and horizon."""
    scenery: tuple[float, float, float]
    subject: tuple[float, float, float]


LIGHTS: dict[str, Light] = {
    "day": Light(sky=((92, 172, 240), (196, 230, 250)), scenery=(1, 1, 1), subject=(1, 1, 1)),
    "sunset": Light(sky=((206, 92, 122), (255, 190, 92)), scenery=(0.98, 0.76, 0.68), subject=(1.0, 0.93, 0.9)),
    "night": Light(sky=((14, 18, 58), (44, 54, 112)), scenery=(0.36, 0.42, 0.66), subject=(0.8, 0.82, 0.94)),
}


def sky_colours(time: str, weather: str) -> tuple[Colour, Colour]:
    """Top and horizon colours; clouds and rain grey them."""
    top, low = LIGHTS[time].sky
    grey = {"day": (150, 160, 174), "sunset": (150, 116, 130), "night": (38, 42, 60)}[time]
    amount = {"clear": 0.0, "cloudy": 0.35, "rain": 0.75}[weather]
    return mix(top, grey, amount), mix(low, lighten(grey, 0.25), amount)


def lights_in_the_sky(time: str, weather: str, rng: Rng) -> list[Shape]:
    """Sun, moon and stars."""
    if weather == "rain":
        return []
    x = float(rng.choice([0.15, 0.85])) + float(rng.uniform(-0.04, 0.04))
    y = float(rng.uniform(0.13, 0.19))
    if time == "day":
        return [ellipse(x, y, 0.09, 0.09, (255, 226, 92))]
    if time == "sunset":
        return [ellipse(x, HORIZON - 0.07, 0.12, 0.12, (255, 234, 150))]
    stars = [
        ellipse(float(sx), float(sy), 0.013, 0.013, (255, 250, 220), edge=False)
        for sx, sy in zip(rng.uniform(0.04, 0.96, 9), rng.uniform(0.04, 0.42, 9), strict=True)
    ]
    moon = [
        ellipse(x, y, 0.085, 0.085, (252, 246, 208)),
        ellipse(x + 0.025, y - 0.02, 0.02, 0.02, (226, 218, 180), edge=False),
    ]
    return [*stars, *moon]


def clouds(time: str, weather: str, rng: Rng) -> list[Shape]:
    if weather == "clear":
        return []
    bright = {"day": (246, 248, 252), "sunset": (250, 196, 186), "night": (92, 98, 128)}[time]
    colour = bright if weather == "cloudy" else darken(mix(bright, (110, 114, 126), 0.55), 0.15)
    shapes: list[Shape] = []
    for x in (0.16, 0.52, 0.86):
        cx, cy = x + float(rng.uniform(-0.08, 0.08)), float(rng.uniform(0.1, 0.2))
        shapes += [
            ellipse(cx - 0.08, cy + 0.02, 0.08, 0.05, colour, edge=False),
            ellipse(cx + 0.08, cy + 0.02, 0.08, 0.05, colour, edge=False),
            ellipse(cx, cy, 0.1, 0.075, colour),
        ]
    return shapes


def rain(weather: str, rng: Rng) -> list[Shape]:
    if weather != "rain":
        return []
    drops = zip(rng.uniform(0, 1, 18), rng.uniform(0.05, 0.95, 18), strict=True)
    return [
        stroke([(float(x), float(y)), (float(x) - 0.02, float(y) + 0.075)], 0.014, (206, 222, 240), edge=False)
        for x, y in drops
    ]


def hills(colour: Colour, rng: Rng, *, height: float = 0.09) -> Shape:
    xs = np.linspace(-0.05, 1.05, 24)
    phase, bend = rng.uniform(0, 6.28), rng.uniform(4.0, 7.0)
    ys = HORIZON - height * (0.5 + 0.5 * np.sin(phase + bend * xs))
    line = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    return polygon([*line, (1.05, 1.05), (-0.05, 1.05)], colour)


def ground(colour: Colour) -> list[Shape]:
    """A plain floor with a slightly darker strip in front, so that the subject stands on something."""
    return [
        box(-0.05, HORIZON, 1.05, 1.05, colour),
        box(-0.05, 0.9, 1.05, 1.05, darken(colour, 0.08), edge=False),
    ]


def sides(rng: Rng, near: float = 0.05, far: float = 0.2) -> tuple[float, float]:
    """One place left and one right of the middle, for landmarks that must not hide the subject."""
    return float(rng.uniform(near, far)), float(1 - rng.uniform(near, far))


def meadow(rng: Rng) -> list[Shape]:
    left, right = sides(rng)
    flowers = [
        ellipse(float(x), float(y), 0.02, 0.02, (255, 240, 130) if i % 2 else (250, 250, 250), edge=False)
        for i, (x, y) in enumerate(zip(rng.uniform(0, 1, 8), rng.uniform(0.76, 0.97, 8), strict=True))
    ]
    bush = (66, 142, 62)
    return [
        hills((140, 200, 96), rng),
        ellipse(left, HORIZON, 0.11, 0.08, bush),
        ellipse(right, HORIZON, 0.09, 0.07, bush),
        *ground((112, 184, 76)),
        *flowers,
    ]


def beach(rng: Rng) -> list[Shape]:
    trunk = sides(rng, 0.06, 0.14)[int(rng.integers(2))]
    leaf = (48, 140, 70)
    leaves = [
        curve([(trunk, 0.36), (trunk + dx * 0.6, 0.36 + dy - 0.05), (trunk + dx, 0.36 + dy + 0.04)], 0.045, leaf)
        for dx, dy in ((-0.2, 0.02), (0.2, 0.02), (-0.13, -0.09), (0.13, -0.09))
    ]
    return [
        box(-0.05, HORIZON - 0.1, 1.05, HORIZON + 0.06, (40, 128, 200)),
        stroke([(0, HORIZON - 0.03), (1, HORIZON - 0.03)], 0.014, (120, 190, 232), edge=False),
        box(-0.05, HORIZON + 0.04, 1.05, HORIZON + 0.075, (240, 246, 248), edge=False),
        box(-0.05, HORIZON + 0.07, 1.05, 1.05, (244, 218, 154)),
        curve([(trunk, 0.8), (trunk + 0.02, 0.6), (trunk, 0.37)], 0.05, (150, 106, 66)),
        *leaves,
    ]


def desert(rng: Rng) -> list[Shape]:
    x = sides(rng, 0.08, 0.15)[int(rng.integers(2))]
    green = (70, 136, 72)
    return [
        hills((236, 190, 110), rng, height=0.12),
        *ground((226, 170, 88)),
        stroke([(x, 0.8), (x, 0.46)], 0.075, green),
        stroke([(x - 0.085, 0.56), (x - 0.085, 0.64), (x, 0.66)], 0.045, green),
        stroke([(x + 0.085, 0.5), (x + 0.085, 0.6), (x, 0.62)], 0.045, green),
    ]


def pine(x: float, bottom: float, size: float, leaf: Colour) -> list[Shape]:
    return [
        box(x - 0.02, bottom - size * 0.2, x + 0.02, bottom, (104, 72, 50), edge=False),
        polygon(
            [
                (x - size * 0.3, bottom - size * 0.15),
                (x + size * 0.3, bottom - size * 0.15),
                (x, bottom - size * 0.7),
            ],
            leaf,
        ),
        polygon(
            [
                (x - size * 0.23, bottom - size * 0.5),
                (x + size * 0.23, bottom - size * 0.5),
                (x, bottom - size),
            ],
            leaf,
        ),
    ]


def snow(rng: Rng) -> list[Shape]:
    left, right = sides(rng)
    leaf = (222, 236, 246)
    return [
        hills((214, 228, 244), rng),
        *pine(left, HORIZON + 0.06, 0.34, darken(leaf, 0.22)),
        *pine(right, HORIZON + 0.04, 0.28, darken(leaf, 0.22)),
        *ground((238, 244, 252)),
    ]


def forest(rng: Rng) -> list[Shape]:
    shapes: list[Shape] = [box(-0.05, HORIZON - 0.2, 1.05, HORIZON + 0.05, (36, 92, 56))]
    for i, x in enumerate((0.02, 0.2, 0.38, 0.62, 0.8, 0.98)):
        leaf = (40, 112, 60) if i % 2 else (28, 88, 52)
        shapes += pine(x + float(rng.uniform(-0.03, 0.03)), HORIZON + 0.03, float(rng.uniform(0.5, 0.6)), leaf)
    return [*shapes, *ground((92, 120, 58))]


def city(rng: Rng) -> list[Shape]:
    shapes: list[Shape] = []
    for i, x in enumerate((0.0, 0.17, 0.36, 0.56, 0.74, 0.9)):
        top = float(rng.uniform(0.2, 0.42))
        shapes.append(box(x, top, x + 0.16, HORIZON + 0.02, ((128, 134, 152), (104, 110, 132), (150, 148, 158))[i % 3]))
        for row in range(3):
            y = top + 0.05 + row * 0.085
            shapes += [box(x + dx, y, x + dx + 0.035, y + 0.045, (255, 234, 150), edge=False) for dx in (0.035, 0.09)]
    road = [box(0.05 + i * 0.25, 0.92, 0.17 + i * 0.25, 0.94, (240, 236, 210), edge=False) for i in range(4)]
    return [*shapes, *ground((96, 98, 106)), *road]


def mountains(rng: Rng) -> list[Shape]:
    shapes: list[Shape] = []
    for x, height, colour in (
        (0.18, 0.4, (124, 120, 146)),
        (0.8, 0.46, (108, 106, 134)),
        (0.5, 0.3, (140, 138, 160)),
    ):
        x += float(rng.uniform(-0.06, 0.06))
        top = HORIZON - height
        shapes.append(polygon([(x - 0.34, HORIZON + 0.02), (x + 0.34, HORIZON + 0.02), (x, top)], colour))
        cap = 0.32
        shapes.append(
            polygon(
                [(x - 0.34 * cap, top + height * cap), (x + 0.34 * cap, top + height * cap), (x, top)],
                (246, 248, 252),
                edge=False,
            )
        )
    return [*shapes, *ground((134, 150, 92))]


SETTINGS: dict[str, Callable[[Rng], list[Shape]]] = {
    "meadow": meadow,
    "beach": beach,
    "desert": desert,
    "snow": snow,
    "forest": forest,
    "city": city,
    "mountains": mountains,
}
