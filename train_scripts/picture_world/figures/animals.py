"""Animals in two poses: sitting, seen from the front, and walking to the right, seen from the side.

A `Species` says what sets one animal apart from another; the two poses are drawn alike for all of them.
"""

from dataclasses import dataclass

from train_scripts.picture_world.palette import BLUSH, CREAM, INK, WHITE
from train_scripts.picture_world.shapes import (
    Color,
    Point,
    Shape,
    blob,
    box,
    darken,
    ellipse,
    lighten,
    line,
    luminance,
    polygon,
)


@dataclass(frozen=True, kw_only=True)
class Species:
    """The traits that a drawing of an animal depends on."""

    ears: str
    tail: str
    snout: str
    body: float = 1.0
    """Width of the body beside that of a cat."""
    head: float = 1.0
    """Size of the head beside that of a cat."""


SPECIES: dict[str, Species] = {
    "cat": Species(ears="pointed", tail="curled", snout="whiskers"),
    "dog": Species(ears="floppy", tail="raised", snout="muzzle", body=1.05),
    "rabbit": Species(ears="long", tail="puff", snout="teeth", body=0.9, head=0.84),
    "fox": Species(ears="pointed", tail="bushy", snout="pointed", body=0.95),
    "bear": Species(ears="round", tail="puff", snout="muzzle", body=1.3, head=1.08),
    "elephant": Species(ears="fans", tail="thin", snout="trunk", body=1.3, head=1.02),
}


def draw_eye(x: float, y: float, size: float) -> list[Shape]:
    """A dark eye with a white rim and a highlight."""
    return [
        ellipse(x, y, size, size * 1.2, WHITE, part="face", rim=False),
        ellipse(x, y + size * 0.1, size * 0.72, size * 0.92, INK, part="face", rim=False),
        ellipse(x - size * 0.24, y - size * 0.28, size * 0.28, size * 0.3, WHITE, part="face", rim=False),
    ]


def draw_smile(x: float, y: float, width: float, color: Color = INK) -> Shape:
    points = [(x - width, y), (x, y + width * 0.5), (x + width, y)]
    return line(points, 0.02, color, part="face", rim=False)


def draw_sitting(species: Species, color: Color) -> list[Shape]:
    """The animal sitting, seen from the front."""
    light, dark = lighten(color, 0.5), darken(color, 0.22)
    w = 0.25 * species.body
    top = 0.3 if species.ears == "long" else 0.06
    r = 0.245 * species.head
    head_y = max(0.5, top + r) - 0.13 if species.ears != "long" else 0.44
    return [
        *_draw_tail(species, color, (w * 0.75, 0.9), 1.0),
        blob(
            [
                (0, 0.5),
                (w * 0.8, 0.62),
                (w * 1.1, 0.88),
                (w * 0.6, 0.98),
                (-w * 0.6, 0.98),
                (-w * 1.1, 0.88),
                (-w * 0.8, 0.62),
            ],
            color,
        ),
        ellipse(0, 0.8, w * 0.56, 0.16, light, rim=False),
        ellipse(-w * 0.62, 0.95, 0.115, 0.055, light, part="legs"),
        ellipse(w * 0.62, 0.95, 0.115, 0.055, light, part="legs"),
        line([(-w * 0.3, 0.72), (-w * 0.28, 0.9)], 0.018, dark, part="legs", rim=False),
        line([(w * 0.3, 0.72), (w * 0.28, 0.9)], 0.018, dark, part="legs", rim=False),
        *_draw_front_head(species, color, 0, head_y, r),
    ]


def draw_walking(species: Species, color: Color) -> list[Shape]:
    """The animal walking to the right, seen from the side."""
    dark = darken(color, 0.22)
    h = 0.17 * (0.5 + 0.5 * species.body)
    back, front, belly = -0.32, 0.16, 0.62
    foot = 0.075 * (0.4 + 0.6 * species.body)
    r = 0.2 * species.head
    legs = [
        *_draw_leg(back + 0.16, belly, foot, dark, 0.03),
        *_draw_leg(front - 0.02, belly, foot, dark, -0.03),
        *_draw_leg(back + 0.04, belly, foot, color, -0.03),
        *_draw_leg(front + 0.08, belly, foot, color, 0.04),
    ]
    body = blob(
        [
            (back - 0.04, belly),
            (back + 0.03, belly - h),
            (-0.08, belly - h * 1.1),
            (front, belly - h),
            (front + 0.13, belly),
            (front, belly + h * 0.75),
            (-0.08, belly + h * 0.8),
            (back + 0.03, belly + h * 0.75),
        ],
        color,
    )
    stomach = ellipse(-0.07, belly + h * 0.5, 0.19, h * 0.3, lighten(color, 0.5), rim=False)
    head_y = 0.42 if species.ears == "long" else 0.38
    return [
        *legs[:2],
        *_draw_tail(species, color, (back, belly - h * 0.5), -1.0),
        *legs[2:],
        body,
        stomach,
        *_draw_front_head(species, color, front + 0.12, head_y, r),
    ]


def _draw_leg(x: float, top: float, width: float, color: Color, stride: float) -> list[Shape]:
    points = [(x, top), (x + stride * 0.4, 0.82), (x + stride, 0.965)]
    return [line(points, width * 1.6, color, part="legs")]


def _draw_front_head(species: Species, color: Color, x: float, y: float, r: float) -> list[Shape]:
    light = lighten(color, 0.55)
    shapes = _draw_ears(species, color, x, y, r)
    shapes.append(ellipse(x, y, r * 1.12, r, color, part="head"))
    eye_y, eye = y - r * 0.08, r * 0.235
    if species.snout == "pointed":
        shapes.append(
            blob(
                [
                    (x - r * 0.98, y + r * 0.3),
                    (x - r * 0.3, y + r * 0.15),
                    (x, y + r * 0.3),
                    (x + r * 0.3, y + r * 0.15),
                    (x + r * 0.98, y + r * 0.3),
                    (x, y + r * 0.96),
                ],
                CREAM,
                part="face",
                rim=False,
            )
        )
    if species.snout in ("muzzle", "whiskers", "teeth"):
        wide = 0.56 if species.snout == "muzzle" else 0.42
        shapes.append(ellipse(x, y + r * 0.42, r * wide, r * 0.4, light, part="face", rim=False))
    for side in (-1, 1):
        shapes += draw_eye(x + side * r * 0.46, eye_y, eye)
        blush = ellipse(x + side * r * 0.78, y + r * 0.34, r * 0.17, r * 0.12, BLUSH, part="face", rim=False)
        shapes.append(blush)
    return [*shapes, *_draw_snout(species, color, x, y, r)]


def _draw_snout(species: Species, color: Color, x: float, y: float, r: float) -> list[Shape]:
    if species.snout == "trunk":
        points: list[Point] = [
            (x, y + r * 0.15),
            (x + r * 0.02, y + r * 0.7),
            (x + r * 0.1, y + r * 1.2),
            (x + r * 0.42, y + r * 1.4),
        ]
        shade = darken(color, 0.14)
        return [
            line(points, r * 0.5, shade, part="face"),
            line([(x - r * 0.4, y + r * 0.62), (x - r * 0.5, y + r * 1.0)], r * 0.2, WHITE, part="face"),
            line([(x + r * 0.4, y + r * 0.62), (x + r * 0.5, y + r * 0.95)], r * 0.2, WHITE, part="face"),
        ]
    nose = INK if species.snout in ("muzzle", "pointed") else BLUSH
    size = 0.2 if species.snout == "muzzle" else 0.14
    nose_y = y + r * (0.62 if species.snout == "pointed" else 0.26)
    shapes = [ellipse(x, nose_y, r * size, r * size * 0.75, nose, part="face", rim=False)]
    if species.snout != "pointed":
        shapes.append(draw_smile(x, y + r * 0.5, r * 0.26))
    if species.snout == "teeth":
        shapes.append(box(x - r * 0.13, y + r * 0.56, x + r * 0.13, y + r * 0.82, WHITE, part="face"))
    if species.snout == "whiskers":
        whisker = INK if luminance(color) > 0.35 else WHITE
        for side in (-1, 1):
            for lift in (-0.08, 0.14):
                start, end = (x + side * r * 0.5, y + r * 0.42), (x + side * r * 1.3, y + r * (0.4 + lift))
                shapes.append(line([start, end], 0.014, whisker, part="face", rim=False))
    return shapes


def _draw_ears(species: Species, color: Color, x: float, y: float, r: float) -> list[Shape]:
    dark, shapes = darken(color, 0.3), []
    for side in (-1, 1):
        if species.ears == "pointed":
            outer = [
                (x + side * r * 1.05, y - r * 0.2),
                (x + side * r * 1.0, y - r * 1.5),
                (x + side * r * 0.2, y - r * 0.8),
            ]
            inner = [
                (x + side * r * 0.92, y - r * 0.5),
                (x + side * r * 0.9, y - r * 1.16),
                (x + side * r * 0.5, y - r * 0.8),
            ]
            shapes += [
                polygon(outer, color, part="ears"),
                polygon(inner, INK if species.tail == "bushy" else BLUSH, part="ears", rim=False),
            ]
        elif species.ears == "floppy":
            shapes.append(
                ellipse(x + side * r * 1.12, y + r * 0.1, r * 0.36, r * 0.82, dark, turn=-side * 14, part="ears")
            )
        elif species.ears == "long":
            ear_x, ear_y, turn = x + side * r * 0.5, y - r * 1.42, side * 10
            shapes += [
                ellipse(ear_x, ear_y, r * 0.33, r * 0.86, color, turn=turn, part="ears"),
                ellipse(ear_x, ear_y, r * 0.16, r * 0.62, BLUSH, turn=turn, part="ears", rim=False),
            ]
        elif species.ears == "round":
            shapes += [
                ellipse(x + side * r * 0.84, y - r * 0.78, r * 0.36, r * 0.36, color, part="ears"),
                ellipse(x + side * r * 0.84, y - r * 0.78, r * 0.19, r * 0.19, dark, part="ears", rim=False),
            ]
        else:
            shapes += [
                ellipse(x + side * r * 1.36, y - r * 0.02, r * 0.62, r * 0.78, color, part="ears"),
                ellipse(
                    x + side * r * 1.38, y + r * 0.02, r * 0.4, r * 0.52, lighten(color, 0.35), part="ears", rim=False
                ),
            ]
    return shapes


def _draw_tail(species: Species, color: Color, root: Point, side: float) -> list[Shape]:
    """The tail from its root, curling away to the given side."""
    x, y = root
    if species.tail == "curled":
        return [
            line(
                [(x, y), (x + side * 0.18, y - 0.05), (x + side * 0.2, y - 0.26), (x + side * 0.12, y - 0.36)],
                0.075,
                color,
                part="tail",
            )
        ]
    if species.tail == "raised":
        return [line([(x, y), (x + side * 0.15, y - 0.12), (x + side * 0.19, y - 0.28)], 0.08, color, part="tail")]
    if species.tail == "bushy":
        tail = [
            (x, y),
            (x + side * 0.12, y + 0.03),
            (x + side * 0.24, y - 0.1),
            (x + side * 0.22, y - 0.36),
            (x + side * 0.1, y - 0.22),
        ]
        tip = (x + side * 0.2, y - 0.29)
        return [blob(tail, color, part="tail"), ellipse(*tip, 0.055, 0.085, CREAM, part="tail", rim=False)]
    if species.tail == "puff":
        return [ellipse(x + side * 0.05, y - 0.02, 0.085, 0.085, lighten(color, 0.6), part="tail")]
    return [
        line([(x, y), (x + side * 0.1, y + 0.04), (x + side * 0.12, y + 0.16)], 0.03, darken(color, 0.3), part="tail")
    ]
