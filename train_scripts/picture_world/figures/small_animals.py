"""Animals that need a drawing of their own: bird, owl, penguin, frog and turtle, each in two poses."""

from train_scripts.picture_world.figures.animals import draw_eye, draw_smile
from train_scripts.picture_world.palette import BEAK, BLUSH, INK, WHITE
from train_scripts.picture_world.shapes import Color, Shape, blob, darken, ellipse, lighten, line, polygon


def draw_standing_bird(color: Color) -> list[Shape]:
    light, dark = lighten(color, 0.55), darken(color, 0.25)
    return [
        line([(-0.02, 0.74), (-0.03, 0.96)], 0.035, BEAK, part="legs"),
        line([(0.1, 0.74), (0.11, 0.96)], 0.035, BEAK, part="legs"),
        line([(-0.05, 0.965), (0.05, 0.965)], 0.035, BEAK, part="legs", rim=False),
        line([(0.09, 0.965), (0.19, 0.965)], 0.035, BEAK, part="legs", rim=False),
        polygon([(-0.2, 0.52), (-0.5, 0.36), (-0.46, 0.56), (-0.24, 0.68)], dark, part="tail"),
        ellipse(0.0, 0.56, 0.29, 0.23, color, turn=-14),
        ellipse(0.08, 0.64, 0.17, 0.12, light, turn=-14, rim=False),
        polygon([(0.34, 0.24), (0.5, 0.32), (0.33, 0.4)], BEAK, part="head"),
        ellipse(0.19, 0.3, 0.19, 0.185, color, part="head"),
        *draw_eye(0.23, 0.27, 0.062),
        ellipse(0.17, 0.38, 0.045, 0.03, BLUSH, part="face", rim=False),
        blob([(0.06, 0.5), (-0.12, 0.46), (-0.28, 0.58), (-0.12, 0.68), (0.04, 0.63)], dark, part="wings"),
        line([(0.15, 0.12), (0.1, 0.03)], 0.035, dark, part="head", rim=False),
        line([(0.19, 0.12), (0.2, 0.02)], 0.035, dark, part="head", rim=False),
    ]


def draw_flying_bird(color: Color) -> list[Shape]:
    light, dark = lighten(color, 0.55), darken(color, 0.25)
    return [
        polygon([(-0.22, 0.6), (-0.52, 0.58), (-0.5, 0.78), (-0.22, 0.72)], dark, part="tail"),
        blob(
            [(0.02, 0.52), (0.12, 0.22), (0.02, 0.06), (-0.1, 0.28), (-0.14, 0.52)], darken(color, 0.35), part="wings"
        ),
        ellipse(0, 0.64, 0.29, 0.17, color),
        ellipse(0.03, 0.72, 0.19, 0.08, light, rim=False),
        polygon([(0.38, 0.5), (0.54, 0.56), (0.38, 0.63)], BEAK, part="head"),
        ellipse(0.26, 0.54, 0.165, 0.16, color, part="head"),
        *draw_eye(0.3, 0.51, 0.055),
        ellipse(0.24, 0.61, 0.04, 0.027, BLUSH, part="face", rim=False),
        blob([(0.06, 0.6), (-0.06, 0.34), (-0.28, 0.12), (-0.34, 0.36), (-0.2, 0.62)], dark, part="wings"),
    ]


def draw_owl(color: Color, *, flying: bool = False) -> list[Shape]:
    light, dark = lighten(color, 0.5), darken(color, 0.28)
    if flying:
        wings = [
            blob(
                [(s * 0.18, 0.46), (s * 0.44, 0.26), (s * 0.58, 0.36), (s * 0.46, 0.62), (s * 0.2, 0.74)],
                dark,
                part="wings",
            )
            for s in (-1, 1)
        ]
    else:
        wings = [ellipse(s * 0.27, 0.66, 0.1, 0.25, dark, turn=-s * 10, part="wings") for s in (-1, 1)]
    ears = [polygon([(s * 0.27, 0.24), (s * 0.27, 0.02), (s * 0.06, 0.14)], dark, part="ears") for s in (-1, 1)]
    rows = [
        line([(x, y), (x + 0.035, y + 0.035), (x + 0.07, y)], 0.02, dark, rim=False)
        for y, xs in ((0.66, (-0.13, -0.035, 0.06)), (0.76, (-0.085, 0.01)))
        for x in xs
    ]
    feet = [ellipse(s * 0.1, 0.965, 0.075, 0.035, BEAK, part="legs") for s in (-1, 1)]
    disks = [ellipse(s * 0.125, 0.32, 0.135, 0.135, light, part="face", rim=False) for s in (-1, 1)]
    return [
        *wings[: 2 if flying else 0],
        *feet,
        blob([(0, 0.1), (0.26, 0.22), (0.29, 0.6), (0.2, 0.93), (-0.2, 0.93), (-0.29, 0.6), (-0.26, 0.22)], color),
        ellipse(0, 0.72, 0.18, 0.2, light, rim=False),
        *rows,
        *wings[2 if flying else 0 :],
        *ears,
        *disks,
        *draw_eye(-0.125, 0.32, 0.085),
        *draw_eye(0.125, 0.32, 0.085),
        polygon([(-0.05, 0.4), (0.05, 0.4), (0, 0.49)], BEAK, part="face", rim=False),
    ]


def draw_penguin(color: Color, *, waving: bool = False) -> list[Shape]:
    left_wing = [(-0.24, 0.5), (-0.42, 0.7), (-0.34, 0.78), (-0.2, 0.68)]
    right_wing = [(0.24, 0.52), (0.44, 0.28), (0.46, 0.4), (0.26, 0.66)] if waving else [(-x, y) for x, y in left_wing]
    return [
        ellipse(-0.12, 0.965, 0.13, 0.04, BEAK, part="legs"),
        ellipse(0.12, 0.965, 0.13, 0.04, BEAK, part="legs"),
        blob(left_wing, darken(color, 0.2), part="wings"),
        blob(right_wing, darken(color, 0.2), part="wings"),
        blob(
            [
                (0, 0.06),
                (0.2, 0.16),
                (0.25, 0.44),
                (0.28, 0.76),
                (0.17, 0.95),
                (-0.17, 0.95),
                (-0.28, 0.76),
                (-0.25, 0.44),
                (-0.2, 0.16),
            ],
            color,
        ),
        blob(
            [
                (0, 0.28),
                (0.13, 0.22),
                (0.18, 0.36),
                (0.19, 0.72),
                (0.1, 0.9),
                (-0.1, 0.9),
                (-0.19, 0.72),
                (-0.18, 0.36),
                (-0.13, 0.22),
            ],
            WHITE,
            rim=False,
        ),
        *draw_eye(-0.085, 0.3, 0.05),
        *draw_eye(0.085, 0.3, 0.05),
        polygon([(-0.065, 0.37), (0.065, 0.37), (0, 0.46)], BEAK, part="face", rim=False),
        ellipse(-0.13, 0.41, 0.035, 0.025, BLUSH, part="face", rim=False),
        ellipse(0.13, 0.41, 0.035, 0.025, BLUSH, part="face", rim=False),
    ]


def draw_frog(color: Color, *, jumping: bool = False) -> list[Shape]:
    light, dark = lighten(color, 0.5), darken(color, 0.2)
    if jumping:
        legs = [
            line([(-0.2, 0.74), (-0.4, 0.84), (-0.32, 0.97)], 0.1, dark, part="legs"),
            line([(0.2, 0.74), (0.42, 0.8), (0.5, 0.95)], 0.1, dark, part="legs"),
            line([(-0.2, 0.6), (-0.4, 0.5), (-0.47, 0.36)], 0.08, color, part="legs"),
            line([(0.2, 0.6), (0.4, 0.52), (0.48, 0.4)], 0.08, color, part="legs"),
        ]
    else:
        legs = [
            ellipse(-0.29, 0.82, 0.15, 0.14, dark, part="legs"),
            ellipse(0.29, 0.82, 0.15, 0.14, dark, part="legs"),
            ellipse(-0.32, 0.95, 0.14, 0.045, color, part="legs"),
            ellipse(0.32, 0.95, 0.14, 0.045, color, part="legs"),
            ellipse(-0.1, 0.955, 0.075, 0.04, color, part="legs"),
            ellipse(0.1, 0.955, 0.075, 0.04, color, part="legs"),
        ]
    eyes = [
        shape
        for s in (-1, 1)
        for shape in (ellipse(s * 0.19, 0.31, 0.12, 0.12, color, part="head"), *draw_eye(s * 0.19, 0.3, 0.078))
    ]
    return [
        *legs,
        ellipse(0, 0.74, 0.26, 0.2, color),
        ellipse(0, 0.8, 0.16, 0.12, light, rim=False),
        ellipse(0, 0.47, 0.34, 0.2, color, part="head"),
        *eyes,
        line([(-0.22, 0.5), (0, 0.59), (0.22, 0.5)], 0.024, INK, part="face", rim=False),
        ellipse(-0.25, 0.51, 0.05, 0.035, BLUSH, part="face", rim=False),
        ellipse(0.25, 0.51, 0.05, 0.035, BLUSH, part="face", rim=False),
    ]


def draw_turtle(color: Color, *, hiding: bool = False) -> list[Shape]:
    skin, dark = lighten(color, 0.45), darken(color, 0.3)
    legs = [ellipse(x, 0.91, 0.085, 0.075, skin, part="legs") for x in (-0.28, -0.1, 0.1, 0.26)]
    shell = blob(
        [(-0.42, 0.84), (-0.36, 0.54), (-0.04, 0.36), (0.28, 0.54), (0.35, 0.84), (0, 0.88)], color, part="shell"
    )
    plates = [
        polygon([(-0.14, 0.52), (0.04, 0.5), (0.1, 0.64), (-0.04, 0.74), (-0.18, 0.66)], dark, part="shell", rim=False),
        polygon([(-0.26, 0.56), (-0.3, 0.72), (-0.22, 0.78), (-0.22, 0.66)], dark, part="shell", rim=False),
        polygon([(0.15, 0.54), (0.26, 0.72), (0.16, 0.78), (0.14, 0.66)], dark, part="shell", rim=False),
    ]
    rim = line([(-0.42, 0.84), (0, 0.89), (0.35, 0.84)], 0.06, dark, part="shell")
    if hiding:
        head = [ellipse(0.35, 0.76, 0.1, 0.085, skin, part="head"), *draw_eye(0.38, 0.74, 0.045)]
        return [*legs, *head, shell, *plates, rim]
    head = [
        line([(0.25, 0.76), (0.36, 0.66), (0.4, 0.56)], 0.12, skin, part="head"),
        ellipse(0.42, 0.48, 0.15, 0.135, skin, part="head"),
        *draw_eye(0.45, 0.46, 0.052),
        draw_smile(0.5, 0.54, 0.045),
        ellipse(0.4, 0.55, 0.035, 0.024, BLUSH, part="face", rim=False),
    ]
    tail = polygon([(-0.4, 0.82), (-0.53, 0.88), (-0.38, 0.88)], skin, part="tail")
    return [tail, *legs, *head, shell, *plates, rim]
