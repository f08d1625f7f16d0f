"""Subjects that are not animals: a robot, buildings, vehicles and plants."""

from train_scripts.picture_world.figures.animals import draw_eye, draw_smile
from train_scripts.picture_world.palette import BLUSH, CREAM, GLASS, INK, LAMP, LEAF, STEEL, WHITE, WOOD
from train_scripts.picture_world.shapes import (
    Color,
    Shape,
    blob,
    box,
    darken,
    ellipse,
    lighten,
    line,
    polygon,
)

SCREEN: Color = (120, 240, 240)


def draw_robot(color: Color, *, waving: bool = False) -> list[Shape]:
    light, dark = lighten(color, 0.42), darken(color, 0.3)
    right_arm = [(0.27, 0.58), (0.41, 0.5), (0.43, 0.36)] if waving else [(0.27, 0.58), (0.39, 0.66), (0.38, 0.78)]
    hand = right_arm[-1]
    return [
        line([(0, 0.16), (0, 0.05)], 0.03, STEEL, part="head"),
        ellipse(0, 0.045, 0.05, 0.045, (240, 70, 60), part="head", glows=True),
        box(-0.19, 0.82, -0.05, 0.98, STEEL, radius=0.02, part="legs"),
        box(0.05, 0.82, 0.19, 0.98, STEEL, radius=0.02, part="legs"),
        line([(-0.27, 0.58), (-0.39, 0.66), (-0.38, 0.78)], 0.075, STEEL, part="arms"),
        line(right_arm, 0.075, STEEL, part="arms"),
        ellipse(-0.38, 0.79, 0.06, 0.06, dark, part="arms"),
        ellipse(*hand, 0.06, 0.06, dark, part="arms"),
        box(-0.26, 0.5, 0.26, 0.86, color, radius=0.05),
        box(-0.15, 0.58, 0.15, 0.74, light, radius=0.03, rim=False),
        ellipse(-0.07, 0.66, 0.036, 0.036, (240, 70, 60), rim=False, glows=True),
        ellipse(0.06, 0.66, 0.036, 0.036, LAMP, rim=False, glows=True),
        box(-0.31, 0.15, 0.31, 0.46, color, radius=0.07, part="head"),
        box(-0.23, 0.21, 0.23, 0.39, INK, radius=0.05, part="face", rim=False),
        ellipse(-0.11, 0.28, 0.05, 0.05, SCREEN, part="face", rim=False, glows=True),
        ellipse(0.11, 0.28, 0.05, 0.05, SCREEN, part="face", rim=False, glows=True),
        line([(-0.06, 0.345), (0, 0.365), (0.06, 0.345)], 0.02, SCREEN, part="face", rim=False, glows=True),
    ]


def draw_house(color: Color, *, tall: bool = False) -> list[Shape]:
    dark, top = darken(color, 0.42), 0.3 if tall else 0.46
    half = 0.26 if tall else 0.34
    shapes = [
        box(half * 0.35, top - 0.26, half * 0.35 + 0.11, top, (150, 84, 70), part="roof"),
        box(-half, top, half, 0.98, color),
        polygon([(-half - 0.09, top + 0.02), (0, top - 0.3), (half + 0.09, top + 0.02)], dark, part="roof"),
        box(-0.08, 0.72, 0.08, 0.98, WOOD, radius=0.02, part="door"),
        ellipse(0.045, 0.86, 0.014, 0.014, LAMP, part="door", rim=False),
        ellipse(0, top - 0.11, 0.055, 0.055, LAMP, part="roof", glows=True),
    ]
    floors = (0.4, 0.56) if tall else (0.56,)
    for y in floors:
        for side in (-1, 1):
            x = side * half * 0.58
            shapes += [
                box(x - 0.072, y, x + 0.072, y + 0.14, LAMP, part="windows", glows=True),
                line([(x, y), (x, y + 0.14)], 0.018, WHITE, part="windows", rim=False),
                line([(x - 0.07, y + 0.07), (x + 0.07, y + 0.07)], 0.018, WHITE, part="windows", rim=False),
            ]
    return shapes


def draw_castle(color: Color, *, open_gate: bool = False) -> list[Shape]:
    dark, roof = darken(color, 0.2), darken(color, 0.48)
    gate = INK if open_gate else WOOD
    shapes = [box(-0.26, 0.54, 0.26, 0.98, color)]
    shapes += [box(x, 0.47, x + 0.09, 0.56, color) for x in (-0.26, -0.125, 0.035, 0.17)]
    for side in (-1, 1):
        x = side * 0.34
        shapes += [
            box(x - 0.12, 0.36, x + 0.12, 0.98, dark, part="towers"),
            polygon([(x - 0.16, 0.37), (x, 0.1), (x + 0.16, 0.37)], roof, part="roof"),
            box(x - 0.035, 0.48, x + 0.035, 0.6, LAMP, radius=0.03, part="windows", glows=True),
        ]
    flag = [
        line([(0, 0.5), (0, 0.08)], 0.02, WOOD, part="flag"),
        polygon([(0.01, 0.09), (0.18, 0.15), (0.01, 0.22)], (236, 72, 72), part="flag"),
    ]
    door = blob([(-0.11, 0.98), (-0.11, 0.78), (0, 0.68), (0.11, 0.78), (0.11, 0.98)], gate, part="door")
    return [*flag, *shapes, door]


def draw_car(color: Color, *, van: bool = False) -> list[Shape]:
    dark = darken(color, 0.28)
    if van:
        cabin = blob(
            [
                (-0.46, 0.82),
                (-0.45, 0.42),
                (-0.36, 0.36),
                (0.2, 0.37),
                (0.32, 0.44),
                (0.4, 0.62),
                (0.46, 0.66),
                (0.46, 0.82),
            ],
            color,
        )
        windows = [(-0.36, 0.46, -0.14), (-0.1, 0.46, 0.12), (0.16, 0.46, 0.29)]
        hood = box(-0.46, 0.66, 0.46, 0.84, color, radius=0.04)
    else:
        cabin = blob([(-0.3, 0.64), (-0.22, 0.46), (-0.08, 0.4), (0.1, 0.41), (0.22, 0.5), (0.3, 0.64)], color)
        windows = [(-0.2, 0.475, -0.03), (0.02, 0.475, 0.18)]
        hood = blob(
            [(-0.48, 0.84), (-0.48, 0.68), (-0.36, 0.6), (0, 0.59), (0.36, 0.61), (0.49, 0.7), (0.48, 0.84)], color
        )
    glass = [box(a, y, b, y + 0.12, GLASS, radius=0.025, part="windows", rim=False) for a, y, b in windows]
    wheels = [
        shape
        for x in (-0.26, 0.27)
        for shape in (
            ellipse(x, 0.85, 0.125, 0.125, INK, part="wheels"),
            ellipse(x, 0.85, 0.055, 0.055, STEEL, part="wheels", rim=False),
        )
    ]
    return [
        cabin,
        hood,
        *glass,
        line([(-0.46, 0.77), (0.46, 0.77)], 0.03, dark, rim=False),
        ellipse(0.445, 0.71, 0.04, 0.045, LAMP, part="lights", rim=False, glows=True),
        *wheels,
    ]


def draw_boat(color: Color, *, steamer: bool = False) -> list[Shape]:
    dark = darken(color, 0.3)
    hull = blob([(-0.48, 0.7), (0.48, 0.68), (0.36, 0.93), (0.2, 0.97), (-0.24, 0.97), (-0.38, 0.92)], color)
    stripe = line([(-0.44, 0.77), (0.43, 0.75)], 0.035, WHITE, rim=False)
    if steamer:
        return [
            box(-0.02, 0.26, 0.12, 0.5, dark, part="funnel"),
            box(-0.02, 0.32, 0.12, 0.38, WHITE, part="funnel", rim=False),
            box(-0.26, 0.48, 0.26, 0.72, CREAM, radius=0.02, part="cabin"),
            *[ellipse(x, 0.59, 0.045, 0.045, GLASS, part="cabin", rim=False) for x in (-0.15, 0, 0.15)],
            hull,
            stripe,
        ]
    return [
        line([(0, 0.7), (0, 0.08)], 0.032, WOOD, part="mast"),
        blob([(0.03, 0.12), (0.22, 0.36), (0.36, 0.6), (0.03, 0.62)], WHITE, part="sail"),
        polygon([(-0.03, 0.2), (-0.3, 0.6), (-0.03, 0.61)], CREAM, part="sail"),
        polygon([(0.01, 0.05), (0.16, 0.09), (0.01, 0.14)], dark, part="mast"),
        hull,
        stripe,
    ]


def draw_rocket(color: Color, *, flying: bool = False) -> list[Shape]:
    dark = darken(color, 0.32)
    flame = [
        blob(
            [(-0.1, 0.86), (0.1, 0.86), (0.06, 0.98), (0, 1.1), (-0.06, 0.98)], (255, 176, 52), part="flame", glows=True
        ),
        blob([(-0.05, 0.86), (0.05, 0.86), (0, 1.0)], (255, 240, 150), part="flame", rim=False, glows=True),
    ]
    return [
        *(flame if flying else []),
        polygon([(-0.15, 0.6), (-0.34, 0.82), (-0.32, 0.97), (-0.12, 0.84)], dark, part="fins"),
        polygon([(0.15, 0.6), (0.34, 0.82), (0.32, 0.97), (0.12, 0.84)], dark, part="fins"),
        blob([(0, 0.0), (0.13, 0.16), (0.2, 0.44), (0.14, 0.86), (-0.14, 0.86), (-0.2, 0.44), (-0.13, 0.16)], color),
        blob(
            [(0, 0.0), (0.1, 0.1), (0.135, 0.19), (0, 0.22), (-0.135, 0.19), (-0.1, 0.1)], dark, part="nose", rim=False
        ),
        ellipse(0, 0.42, 0.11, 0.11, WHITE, part="windows", rim=False),
        ellipse(0, 0.42, 0.078, 0.078, GLASS, part="windows", rim=False, glows=True),
        box(-0.155, 0.68, 0.155, 0.74, lighten(color, 0.5), rim=False),
    ]


def draw_balloon(color: Color, *, striped: bool = False) -> list[Shape]:
    """A hot-air balloon, with two side stripes or with one broad belt."""
    light = lighten(color, 0.55)
    envelope = blob(
        [
            (0, 0.0),
            (0.28, 0.1),
            (0.37, 0.34),
            (0.25, 0.58),
            (0.08, 0.72),
            (-0.08, 0.72),
            (-0.25, 0.58),
            (-0.37, 0.34),
            (-0.28, 0.1),
        ],
        color,
        part="envelope",
    )
    if striped:
        marks = [
            blob(
                [(-0.06, 0.02), (-0.2, 0.16), (-0.22, 0.4), (-0.06, 0.7), (-0.1, 0.4)],
                light,
                part="envelope",
                rim=False,
            ),
            blob([(0.06, 0.02), (0.2, 0.16), (0.22, 0.4), (0.06, 0.7), (0.1, 0.4)], light, part="envelope", rim=False),
        ]
    else:
        marks = [
            blob(
                [(-0.365, 0.3), (0, 0.37), (0.365, 0.3), (0.33, 0.46), (0, 0.53), (-0.33, 0.46)],
                light,
                part="envelope",
                rim=False,
            )
        ]
    return [
        line([(-0.1, 0.7), (-0.085, 0.85)], 0.018, WOOD, part="basket", rim=False),
        line([(0.1, 0.7), (0.085, 0.85)], 0.018, WOOD, part="basket", rim=False),
        envelope,
        *marks,
        box(-0.11, 0.84, 0.11, 0.99, WOOD, radius=0.02, part="basket"),
        line([(-0.11, 0.87), (0.11, 0.87)], 0.025, CREAM, part="basket", rim=False),
    ]


def draw_mushroom(color: Color, *, twin: bool = False) -> list[Shape]:
    cap = blob(
        [(-0.4, 0.5), (-0.36, 0.26), (-0.16, 0.08), (0.16, 0.08), (0.36, 0.26), (0.4, 0.5), (0, 0.56)],
        color,
        part="cap",
    )
    stem = blob(
        [(-0.13, 0.48), (0.13, 0.48), (0.15, 0.76), (0.19, 0.97), (-0.19, 0.97), (-0.15, 0.76)], CREAM, part="stem"
    )
    dots = [
        ellipse(x, y, r, r * 0.85, WHITE, part="cap", rim=False)
        for x, y, r in ((-0.2, 0.3, 0.075), (0.06, 0.2, 0.085), (0.24, 0.38, 0.06), (-0.02, 0.43, 0.05))
    ]
    face = [*draw_eye(-0.065, 0.7, 0.04), *draw_eye(0.065, 0.7, 0.04), draw_smile(0, 0.79, 0.045)]
    small = [
        blob([(0.25, 0.78), (0.37, 0.78), (0.39, 0.97), (0.23, 0.97)], CREAM, part="stem"),
        blob([(0.14, 0.8), (0.2, 0.66), (0.31, 0.61), (0.42, 0.66), (0.48, 0.8), (0.31, 0.83)], color, part="cap"),
        ellipse(0.27, 0.71, 0.04, 0.034, WHITE, part="cap", rim=False),
    ]
    return [stem, *face, cap, *dots, *(small if twin else [])]


def draw_flower(color: Color, *, tulip: bool = False) -> list[Shape]:
    stem = [
        line([(0, 0.45), (0.03, 0.7), (0, 0.98)], 0.05, LEAF, part="stem"),
        blob([(0.01, 0.88), (0.12, 0.7), (0.34, 0.66), (0.24, 0.84)], LEAF, part="leaves"),
        blob([(0.0, 0.94), (-0.12, 0.78), (-0.34, 0.76), (-0.22, 0.92)], LEAF, part="leaves"),
    ]
    if tulip:
        dark = darken(color, 0.22)
        return [
            *stem,
            blob(
                [(-0.26, 0.1), (-0.05, 0.3), (0.05, 0.3), (0.26, 0.1), (0.26, 0.38), (0, 0.54), (-0.26, 0.38)],
                dark,
                part="petals",
            ),
            blob(
                [(0, 0.04), (0.16, 0.26), (0.13, 0.46), (0, 0.53), (-0.13, 0.46), (-0.16, 0.26)], color, part="petals"
            ),
        ]
    reach = 0.235
    petals = [
        ellipse(reach * x, 0.29 + reach * y, 0.135, 0.135, color, part="petals")
        for x, y in ((0, -1), (0.95, -0.31), (0.59, 0.81), (-0.59, 0.81), (-0.95, -0.31))
    ]
    center = (120, 78, 40) if color == (250, 212, 52) else (255, 214, 76)
    return [
        *stem,
        *petals,
        ellipse(0, 0.29, 0.15, 0.15, center, part="center"),
        *draw_eye(-0.055, 0.27, 0.036),
        *draw_eye(0.055, 0.27, 0.036),
        draw_smile(0, 0.34, 0.05),
        ellipse(-0.1, 0.33, 0.03, 0.02, BLUSH, part="center", rim=False),
        ellipse(0.1, 0.33, 0.03, 0.02, BLUSH, part="center", rim=False),
    ]
