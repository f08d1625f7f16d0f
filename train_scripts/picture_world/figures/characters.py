"""Four characters that the embedded base never sees: subjects for DreamBooth training and its tests.

A humanoid (pim, a small wizard), an animal (zuki, a striped dragon), an object (tok, a walking teapot) and a toy
(gloop, a one-eyed plush). Each keeps its own colors in every scene and has two poses.
"""

from train_scripts.picture_world.figures.animals import draw_eye, draw_smile
from train_scripts.picture_world.palette import BLUSH, CREAM, INK, WHITE
from train_scripts.picture_world.shapes import Color, Shape, blob, box, ellipse, line, polygon, star_points

TEAL: Color = (26, 182, 172)
MAGENTA: Color = (222, 44, 150)
ORANGE: Color = (246, 128, 36)
VIOLET: Color = (98, 62, 196)
SKIN: Color = (250, 204, 168)
INDIGO: Color = (66, 60, 160)
GOLD: Color = (252, 208, 70)
MINT: Color = (150, 226, 190)
CORAL: Color = (240, 100, 92)


def draw_gloop(*, waving: bool = False) -> list[Shape]:
    """A teal plush with one large eye, magenta horns and magenta legs."""
    right_arm = [(0.34, 0.6), (0.47, 0.44)] if waving else [(0.34, 0.62), (0.46, 0.76)]
    return [
        line([(-0.18, 0.8), (-0.19, 0.95)], 0.13, MAGENTA, part="legs"),
        line([(0.18, 0.8), (0.19, 0.95)], 0.13, MAGENTA, part="legs"),
        line([(-0.34, 0.62), (-0.46, 0.76)], 0.1, MAGENTA, part="arms"),
        line(right_arm, 0.1, MAGENTA, part="arms"),
        polygon([(-0.34, 0.3), (-0.38, 0.0), (-0.12, 0.18)], MAGENTA, part="horns"),
        polygon([(0.34, 0.3), (0.38, 0.0), (0.12, 0.18)], MAGENTA, part="horns"),
        blob(
            [(0, 0.12), (0.28, 0.22), (0.39, 0.5), (0.36, 0.84), (0, 0.88), (-0.36, 0.84), (-0.39, 0.5), (-0.28, 0.22)],
            TEAL,
        ),
        ellipse(0, 0.42, 0.2, 0.2, WHITE, part="face"),
        ellipse(0.02, 0.44, 0.115, 0.125, INK, part="face", rim=False),
        ellipse(-0.03, 0.38, 0.045, 0.045, WHITE, part="face", rim=False),
        line([(-0.16, 0.69), (0, 0.76), (0.16, 0.69)], 0.035, INK, part="face", rim=False),
    ]


def draw_zuki(*, flying: bool = False) -> list[Shape]:
    """A round dragon with orange and cream stripes, violet wings and a violet crest."""
    lift = -0.16 if flying else 0.1
    wings = [
        blob(
            [
                (s * 0.22, 0.55),
                (s * 0.42, 0.42 + lift),
                (s * 0.56, 0.34 + lift),
                (s * 0.5, 0.62 + lift / 2),
                (s * 0.28, 0.72),
            ],
            VIOLET,
            part="wings",
        )
        for s in (-1, 1)
    ]
    crest = [
        polygon([(x - 0.075, 0.2), (x, y), (x + 0.075, 0.2)], VIOLET, part="crest")
        for x, y in ((-0.12, 0.06), (0, 0.0), (0.12, 0.06))
    ]
    return [
        *wings,
        blob([(0.14, 0.84), (0.34, 0.86), (0.46, 0.76), (0.42, 0.9), (0.24, 0.97)], ORANGE, part="tail"),
        *crest,
        ellipse(-0.13, 0.94, 0.1, 0.055, VIOLET, part="legs"),
        ellipse(0.13, 0.94, 0.1, 0.055, VIOLET, part="legs"),
        blob(
            [(0, 0.14), (0.24, 0.22), (0.31, 0.5), (0.28, 0.8), (0, 0.94), (-0.28, 0.8), (-0.31, 0.5), (-0.24, 0.22)],
            ORANGE,
        ),
        blob([(-0.275, 0.58), (0, 0.63), (0.275, 0.58), (0.285, 0.67), (0, 0.73), (-0.285, 0.67)], CREAM, rim=False),
        blob([(-0.25, 0.78), (0, 0.82), (0.25, 0.78), (0.19, 0.86), (0, 0.9), (-0.19, 0.86)], CREAM, rim=False),
        *draw_eye(-0.13, 0.36, 0.075),
        *draw_eye(0.13, 0.36, 0.075),
        ellipse(0, 0.47, 0.13, 0.075, CREAM, part="face", rim=False),
        ellipse(-0.04, 0.455, 0.016, 0.016, INK, part="face", rim=False),
        ellipse(0.04, 0.455, 0.016, 0.016, INK, part="face", rim=False),
        draw_smile(0, 0.5, 0.05),
    ]


def draw_pim(*, waving: bool = False) -> list[Shape]:
    """A small wizard in an indigo robe and pointed hat with gold stars and orange hair."""
    right_arm = [(0.15, 0.6), (0.3, 0.52), (0.36, 0.38)] if waving else [(0.15, 0.6), (0.28, 0.68), (0.3, 0.78)]
    return [
        ellipse(-0.1, 0.96, 0.09, 0.04, (120, 72, 48), part="legs"),
        ellipse(0.1, 0.96, 0.09, 0.04, (120, 72, 48), part="legs"),
        line([(-0.15, 0.6), (-0.28, 0.68), (-0.3, 0.78)], 0.1, INDIGO, part="arms"),
        line(right_arm, 0.1, INDIGO, part="arms"),
        ellipse(-0.3, 0.8, 0.05, 0.05, SKIN, part="arms"),
        ellipse(*right_arm[-1], 0.05, 0.05, SKIN, part="arms"),
        blob([(-0.12, 0.52), (0.12, 0.52), (0.2, 0.74), (0.28, 0.94), (0, 0.97), (-0.28, 0.94), (-0.2, 0.74)], INDIGO),
        line([(-0.26, 0.9), (0, 0.935), (0.26, 0.9)], 0.045, GOLD, rim=False),
        polygon(star_points(0, 0.75, 0.085), GOLD, rim=False),
        ellipse(0, 0.4, 0.24, 0.2, ORANGE, part="head"),
        ellipse(0, 0.42, 0.18, 0.165, SKIN, part="face", rim=False),
        *draw_eye(-0.075, 0.42, 0.044),
        *draw_eye(0.075, 0.42, 0.044),
        draw_smile(0, 0.5, 0.055),
        ellipse(-0.125, 0.485, 0.032, 0.024, BLUSH, part="face", rim=False),
        ellipse(0.125, 0.485, 0.032, 0.024, BLUSH, part="face", rim=False),
        blob([(-0.23, 0.3), (-0.1, 0.12), (0.06, 0.0), (0.13, 0.04), (0.13, 0.16), (0.23, 0.3)], INDIGO, part="hat"),
        blob([(-0.34, 0.29), (0, 0.25), (0.34, 0.29), (0.26, 0.35), (0, 0.32), (-0.26, 0.35)], INDIGO, part="hat"),
        polygon(star_points(0.02, 0.19, 0.065), GOLD, part="hat", rim=False),
    ]


def draw_tok(*, pouring: bool = False) -> list[Shape]:
    """A mint teapot with coral dots, a coral lid and two feet."""
    steam = [
        line([(0.44, 0.3), (0.5, 0.22), (0.44, 0.14), (0.5, 0.05)], 0.035, (250, 250, 250), part="steam", rim=False),
    ]
    return [
        line([(-0.14, 0.84), (-0.16, 0.95)], 0.06, CORAL, part="legs"),
        line([(0.14, 0.84), (0.16, 0.95)], 0.06, CORAL, part="legs"),
        ellipse(-0.17, 0.965, 0.085, 0.035, CORAL, part="legs"),
        ellipse(0.17, 0.965, 0.085, 0.035, CORAL, part="legs"),
        line([(-0.28, 0.44), (-0.46, 0.44), (-0.46, 0.66), (-0.28, 0.7)], 0.06, CORAL, part="handle"),
        blob(
            [(0.24, 0.72), (0.3, 0.56), (0.4, 0.42), (0.47, 0.34), (0.5, 0.4), (0.44, 0.6), (0.3, 0.8)],
            MINT,
            part="spout",
        ),
        *(steam if pouring else []),
        blob(
            [
                (0, 0.3),
                (0.24, 0.36),
                (0.34, 0.58),
                (0.26, 0.82),
                (0, 0.88),
                (-0.26, 0.82),
                (-0.34, 0.58),
                (-0.24, 0.36),
            ],
            MINT,
        ),
        *[
            ellipse(x, y, 0.042, 0.042, CORAL, rim=False)
            for x, y in ((-0.22, 0.48), (0.2, 0.76), (-0.18, 0.77), (0.23, 0.5))
        ],
        *draw_eye(-0.09, 0.54, 0.062),
        *draw_eye(0.09, 0.54, 0.062),
        line([(-0.06, 0.67), (0, 0.7), (0.06, 0.67)], 0.025, INK, part="face", rim=False),
        ellipse(-0.16, 0.65, 0.035, 0.025, BLUSH, part="face", rim=False),
        ellipse(0.16, 0.65, 0.035, 0.025, BLUSH, part="face", rim=False),
        blob([(-0.22, 0.35), (-0.12, 0.25), (0.12, 0.25), (0.22, 0.35), (0, 0.39)], CORAL, part="lid"),
        box(-0.025, 0.18, 0.025, 0.27, CORAL, part="lid", rim=False),
        ellipse(0, 0.17, 0.06, 0.055, GOLD, part="lid"),
    ]
