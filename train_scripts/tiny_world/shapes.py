"""A picture as a list of coloured shapes, so that one scene can be drawn in many styles.

Coordinates are fractions of the picture's side: (0, 0) is top left, (1, 1) bottom right. Subjects are drawn
in a box of their own (x from -0.5 to 0.5, y from 0 at the top to 1 at the feet) and then placed into a scene.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

Colour = tuple[int, int, int]
Points = np.ndarray  # (n, 2), float64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A filled polygon, or a stroke along a line when `width` is above zero."""

    points: Points
    fill: Colour
    width: float = 0.0
    """Stroke width as a fraction of the side; 0 fills the polygon."""
    edge: bool = True
    """Whether styles that draw lines outline this shape (stars, spots and streaks say no)."""


def lighten(colour: Colour, amount: float) -> Colour:
    """The colour moved towards white by `amount` in 0..1."""
    r, g, b = (round(c + (255 - c) * amount) for c in colour)
    return r, g, b


def darken(colour: Colour, amount: float) -> Colour:
    """The colour moved towards black by `amount` in 0..1."""
    r, g, b = (round(c * (1 - amount)) for c in colour)
    return r, g, b


def mix(a: Colour, b: Colour, amount: float) -> Colour:
    """`amount` of `b` in `a`."""
    red, green, blue = (round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))
    return red, green, blue


def polygon(points: list[tuple[float, float]], fill: Colour, *, edge: bool = True) -> Shape:
    return Shape(points=np.array(points, dtype=np.float64), fill=fill, edge=edge)


def box(left: float, top: float, right: float, bottom: float, fill: Colour, *, edge: bool = True) -> Shape:
    return polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill, edge=edge)


def ellipse(x: float, y: float, rx: float, ry: float, fill: Colour, *, turn: float = 0.0, edge: bool = True) -> Shape:
    """An ellipse around (x, y), turned by `turn` degrees."""
    t = np.linspace(0, 2 * math.pi, 36, endpoint=False)
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    px, py = rx * np.cos(t), ry * np.sin(t)
    return Shape(points=np.stack([x + c * px - s * py, y + s * px + c * py], axis=1), fill=fill, edge=edge)


def stroke(points: list[tuple[float, float]], width: float, fill: Colour, *, edge: bool = True) -> Shape:
    return Shape(points=np.array(points, dtype=np.float64), fill=fill, width=width, edge=edge)


def curve(points: list[tuple[float, float]], width: float, fill: Colour, *, edge: bool = True) -> Shape:
    """A smooth stroke through the points (Catmull-Rom)."""
    p = np.array([points[0], *points, points[-1]], dtype=np.float64)
    t = np.linspace(0, 1, 8, endpoint=False)[:, None]
    parts = [
        0.5
        * (
            2 * p[i]
            + (p[i + 1] - p[i - 1]) * t
            + (2 * p[i - 1] - 5 * p[i] + 4 * p[i + 1] - p[i + 2]) * t**2
            + (3 * p[i] - p[i - 1] - 3 * p[i + 1] + p[i + 2]) * t**3
        )
        for i in range(1, len(p) - 2)
    ]
    return Shape(points=np.concatenate([*parts, p[-1:]]), fill=fill, width=width, edge=edge)


def place(shapes: list[Shape], *, x: float, bottom: float, height: float, mirrored: bool) -> list[Shape]:
    """Shapes of a subject's own box, put into the scene with its feet at (x, bottom)."""
    sign = -1.0 if mirrored else 1.0
    return [
        replace(
            shape,
            points=shape.points * np.array([sign * height, height]) + np.array([x, bottom - height]),
            width=shape.width * height,
        )
        for shape in shapes
    ]


def tinted(shapes: list[Shape], light: tuple[float, float, float]) -> list[Shape]:
    """The shapes under a coloured light: each channel multiplied, clipped at white."""
    return [replace(s, fill=lit(s.fill, light)) for s in shapes]


def lit(colour: Colour, light: tuple[float, float, float]) -> Colour:
    r, g, b = (min(255, round(c * k)) for c, k in zip(colour, light, strict=True))
    return r, g, b
