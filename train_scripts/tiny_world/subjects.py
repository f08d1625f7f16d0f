"""The subjects of the picture world, each a function from a colour to shapes in its own box.

The box: x from -0.5 to 0.5, y from 0 (top) to 1 (feet). Shapes are listed back to front.
"""

import math
from collections.abc import Callable

from train_scripts.tiny_world.shapes import (
    Colour,
    Shape,
    box,
    curve,
    darken,
    ellipse,
    lighten,
    polygon,
    stroke,
)

BLACK: Colour = (28, 26, 34)
WHITE: Colour = (250, 250, 248)
PINK: Colour = (244, 150, 170)
GLASS: Colour = (178, 224, 246)
GREY: Colour = (120, 124, 134)
WOOD: Colour = (134, 88, 52)
YELLOW: Colour = (250, 208, 60)


def eyes(x: float, y: float, size: float) -> list[Shape]:
    """A pair of round dark eyes with a highlight, mirrored about the middle."""
    shapes: list[Shape] = []
    for side in (-1, 1):
        shapes.append(ellipse(side * x, y, size, size * 1.25, WHITE, edge=False))
        shapes.append(ellipse(side * x + 0.008, y + 0.012, size * 0.68, size * 0.92, BLACK, edge=False))
        shapes.append(ellipse(side * x - 0.012, y - 0.02, size * 0.26, size * 0.3, WHITE, edge=False))
    return shapes


def cat(colour: Colour) -> list[Shape]:
    light, dark = lighten(colour, 0.55), darken(colour, 0.28)
    return [
        curve([(0.2, 0.92), (0.42, 0.9), (0.47, 0.7), (0.4, 0.54)], 0.1, dark),
        ellipse(0, 0.76, 0.28, 0.25, colour),
        ellipse(0, 0.78, 0.15, 0.19, light, edge=False),
        polygon([(-0.34, 0.34), (-0.33, 0.0), (-0.06, 0.16)], colour),
        polygon([(0.34, 0.34), (0.33, 0.0), (0.06, 0.16)], colour),
        polygon([(-0.28, 0.22), (-0.28, 0.08), (-0.15, 0.17)], PINK, edge=False),
        polygon([(0.28, 0.22), (0.28, 0.08), (0.15, 0.17)], PINK, edge=False),
        ellipse(0, 0.36, 0.35, 0.25, colour),
        ellipse(0, 0.46, 0.17, 0.11, light, edge=False),
        *eyes(0.155, 0.33, 0.075),
        polygon([(-0.045, 0.41), (0.045, 0.41), (0, 0.465)], PINK, edge=False),
        stroke([(-0.16, 0.45), (-0.43, 0.41)], 0.018, BLACK, edge=False),
        stroke([(-0.16, 0.49), (-0.42, 0.52)], 0.018, BLACK, edge=False),
        stroke([(0.16, 0.45), (0.43, 0.41)], 0.018, BLACK, edge=False),
        stroke([(0.16, 0.49), (0.42, 0.52)], 0.018, BLACK, edge=False),
        ellipse(-0.13, 0.96, 0.11, 0.06, light),
        ellipse(0.13, 0.96, 0.11, 0.06, light),
    ]


def dog(colour: Colour) -> list[Shape]:
    light, dark = lighten(colour, 0.6), darken(colour, 0.42)
    return [
        curve([(0.2, 0.85), (0.38, 0.76), (0.44, 0.58)], 0.09, colour),
        ellipse(0, 0.76, 0.27, 0.25, colour),
        ellipse(0, 0.74, 0.14, 0.17, light, edge=False),
        ellipse(0, 0.32, 0.29, 0.29, colour),
        ellipse(-0.32, 0.37, 0.12, 0.27, dark, turn=12),
        ellipse(0.32, 0.37, 0.12, 0.27, dark, turn=-12),
        ellipse(0, 0.44, 0.19, 0.15, light),
        *eyes(0.13, 0.25, 0.06),
        ellipse(0, 0.56, 0.06, 0.08, PINK, edge=False),
        ellipse(0, 0.375, 0.085, 0.062, BLACK, edge=False),
        curve([(-0.13, 0.48), (-0.06, 0.52), (0, 0.47), (0.06, 0.52), (0.13, 0.48)], 0.022, BLACK, edge=False),
        ellipse(-0.14, 0.96, 0.12, 0.06, light),
        ellipse(0.14, 0.96, 0.12, 0.06, light),
    ]


def rabbit(colour: Colour) -> list[Shape]:
    light = lighten(colour, 0.6)
    return [
        ellipse(0.27, 0.84, 0.1, 0.1, WHITE),
        ellipse(0, 0.78, 0.25, 0.23, colour),
        ellipse(0, 0.8, 0.14, 0.16, light, edge=False),
        ellipse(-0.14, 0.2, 0.095, 0.23, colour, turn=-10),
        ellipse(0.14, 0.2, 0.095, 0.23, colour, turn=10),
        ellipse(-0.14, 0.2, 0.045, 0.17, PINK, turn=-10, edge=False),
        ellipse(0.14, 0.2, 0.045, 0.17, PINK, turn=10, edge=False),
        ellipse(0, 0.47, 0.26, 0.2, colour),
        ellipse(-0.08, 0.56, 0.09, 0.07, light, edge=False),
        ellipse(0.08, 0.56, 0.09, 0.07, light, edge=False),
        box(-0.045, 0.57, 0.045, 0.66, WHITE, edge=False),
        *eyes(0.125, 0.43, 0.058),
        ellipse(0, 0.52, 0.04, 0.03, PINK, edge=False),
        ellipse(-0.15, 0.96, 0.14, 0.055, light),
        ellipse(0.15, 0.96, 0.14, 0.055, light),
    ]


def bird(colour: Colour) -> list[Shape]:
    light, dark = lighten(colour, 0.55), darken(colour, 0.3)
    orange = (242, 142, 40)
    return [
        stroke([(-0.06, 0.78), (-0.06, 0.97)], 0.04, orange, edge=False),
        stroke([(0.1, 0.78), (0.1, 0.97)], 0.04, orange, edge=False),
        stroke([(-0.14, 0.97), (0.0, 0.97)], 0.04, orange, edge=False),
        stroke([(0.02, 0.97), (0.18, 0.97)], 0.04, orange, edge=False),
        polygon([(0.18, 0.5), (0.5, 0.3), (0.46, 0.62), (0.24, 0.72)], dark),
        ellipse(0.04, 0.56, 0.31, 0.27, colour),
        ellipse(-0.04, 0.66, 0.2, 0.15, light, edge=False),
        ellipse(-0.18, 0.28, 0.21, 0.21, colour),
        polygon([(-0.34, 0.22), (-0.52, 0.32), (-0.34, 0.4)], orange),
        ellipse(-0.22, 0.24, 0.07, 0.08, WHITE, edge=False),
        ellipse(-0.235, 0.25, 0.045, 0.055, BLACK, edge=False),
        polygon([(-0.06, 0.48), (0.12, 0.4), (0.34, 0.52), (0.26, 0.66), (0.08, 0.68)], dark),
        polygon([(-0.18, 0.1), (-0.14, 0.0), (-0.08, 0.1)], dark, edge=False),
    ]


def robot(colour: Colour) -> list[Shape]:
    light, dark = lighten(colour, 0.45), darken(colour, 0.35)
    cyan = (110, 236, 240)
    return [
        stroke([(0, 0.14), (0, 0.04)], 0.035, GREY, edge=False),
        ellipse(0, 0.045, 0.055, 0.045, (240, 70, 60)),
        box(-0.2, 0.84, -0.06, 1.0, dark),
        box(0.06, 0.84, 0.2, 1.0, dark),
        stroke([(-0.27, 0.56), (-0.4, 0.76)], 0.09, GREY),
        stroke([(0.27, 0.56), (0.4, 0.76)], 0.09, GREY),
        box(-0.28, 0.49, 0.28, 0.86, colour),
        box(-0.17, 0.56, 0.17, 0.74, light),
        ellipse(-0.08, 0.65, 0.045, 0.045, (240, 70, 60), edge=False),
        ellipse(0.08, 0.65, 0.045, 0.045, YELLOW, edge=False),
        box(-0.34, 0.13, 0.34, 0.46, colour),
        box(-0.27, 0.18, 0.27, 0.36, BLACK, edge=False),
        box(-0.2, 0.21, -0.07, 0.33, cyan, edge=False),
        box(0.07, 0.21, 0.2, 0.33, cyan, edge=False),
        box(-0.16, 0.39, 0.16, 0.43, dark, edge=False),
    ]


def house(colour: Colour) -> list[Shape]:
    light = lighten(colour, 0.35)
    roof = (150, 70, 56)
    return [
        box(0.18, 0.06, 0.3, 0.36, (120, 80, 74)),
        box(-0.4, 0.42, 0.4, 1.0, colour),
        box(-0.4, 0.42, 0.4, 0.5, light, edge=False),
        polygon([(-0.52, 0.46), (0, 0.04), (0.52, 0.46)], roof),
        box(-0.1, 0.68, 0.1, 1.0, WOOD),
        ellipse(0.055, 0.85, 0.022, 0.022, YELLOW, edge=False),
        box(-0.33, 0.58, -0.16, 0.76, (255, 232, 140)),
        box(0.16, 0.58, 0.33, 0.76, (255, 232, 140)),
        stroke([(-0.245, 0.58), (-0.245, 0.76)], 0.024, WHITE, edge=False),
        stroke([(0.245, 0.58), (0.245, 0.76)], 0.024, WHITE, edge=False),
        ellipse(0, 0.3, 0.075, 0.075, (255, 232, 140)),
    ]


def car(colour: Colour) -> list[Shape]:
    dark = darken(colour, 0.3)
    return [
        polygon([(-0.3, 0.56), (-0.2, 0.28), (0.2, 0.28), (0.36, 0.56)], colour),
        polygon([(-0.22, 0.55), (-0.15, 0.34), (0.0, 0.34), (0.0, 0.55)], GLASS),
        polygon([(0.04, 0.55), (0.04, 0.34), (0.17, 0.34), (0.28, 0.55)], GLASS),
        polygon([(-0.56, 0.62), (-0.5, 0.54), (0.46, 0.54), (0.58, 0.64), (0.58, 0.86), (-0.56, 0.86)], colour),
        box(-0.56, 0.76, 0.58, 0.86, dark, edge=False),
        ellipse(0.53, 0.66, 0.05, 0.05, (255, 240, 150), edge=False),
        ellipse(-0.53, 0.66, 0.04, 0.05, (230, 60, 50), edge=False),
        ellipse(-0.3, 0.86, 0.145, 0.14, BLACK),
        ellipse(0.32, 0.86, 0.145, 0.14, BLACK),
        ellipse(-0.3, 0.86, 0.065, 0.065, (200, 204, 210), edge=False),
        ellipse(0.32, 0.86, 0.065, 0.065, (200, 204, 210), edge=False),
    ]


def boat(colour: Colour) -> list[Shape]:
    light, dark = lighten(colour, 0.4), darken(colour, 0.3)
    return [
        stroke([(0, 0.05), (0, 0.76)], 0.045, WOOD, edge=False),
        polygon([(0.04, 0.04), (0.04, 0.66), (0.44, 0.66)], WHITE),
        polygon([(-0.04, 0.16), (-0.04, 0.66), (-0.34, 0.66)], (232, 228, 216)),
        polygon([(0, 0.03), (-0.2, 0.08), (0, 0.14)], colour, edge=False),
        polygon([(-0.54, 0.74), (0.54, 0.74), (0.36, 1.0), (-0.36, 1.0)], colour),
        polygon([(-0.54, 0.74), (0.54, 0.74), (0.5, 0.8), (-0.5, 0.8)], light, edge=False),
        polygon([(-0.42, 0.92), (0.42, 0.92), (0.36, 1.0), (-0.36, 1.0)], dark, edge=False),
        ellipse(-0.2, 0.86, 0.04, 0.035, WHITE, edge=False),
        ellipse(0, 0.86, 0.04, 0.035, WHITE, edge=False),
        ellipse(0.2, 0.86, 0.04, 0.035, WHITE, edge=False),
    ]


def rocket(colour: Colour) -> list[Shape]:
    light, dark = lighten(colour, 0.4), darken(colour, 0.35)
    hull = [(math.sin(t * math.pi) ** 0.75 * 0.21, 0.02 + 0.8 * t) for t in (0, 0.08, 0.2, 0.35, 0.5, 0.65)]
    hull += [(0.17, 0.7), (0.13, 0.82)]
    return [
        polygon([(-0.1, 0.82), (0.1, 0.82), (0, 1.02)], (255, 150, 40), edge=False),
        polygon([(-0.06, 0.82), (0.06, 0.82), (0, 0.94)], (255, 236, 130), edge=False),
        polygon([(-0.16, 0.52), (-0.38, 0.78), (-0.36, 0.92), (-0.13, 0.78)], dark),
        polygon([(0.16, 0.52), (0.38, 0.78), (0.36, 0.92), (0.13, 0.78)], dark),
        polygon([*hull, *[(-x, y) for x, y in reversed(hull)]], colour),
        polygon([(0, 0.02), (0.13, 0.2), (-0.13, 0.2)], light, edge=False),
        ellipse(0, 0.38, 0.115, 0.115, WHITE),
        ellipse(0, 0.38, 0.08, 0.08, (90, 170, 230), edge=False),
        box(-0.17, 0.58, 0.17, 0.64, light, edge=False),
    ]


def balloon(colour: Colour) -> list[Shape]:
    light, dark = lighten(colour, 0.5), darken(colour, 0.2)
    return [
        stroke([(-0.24, 0.58), (-0.1, 0.82)], 0.022, WOOD, edge=False),
        stroke([(0.24, 0.58), (0.1, 0.82)], 0.022, WOOD, edge=False),
        polygon([(-0.34, 0.5), (0.34, 0.5), (0.14, 0.7), (-0.14, 0.7)], dark),
        ellipse(0, 0.35, 0.38, 0.34, colour),
        ellipse(0, 0.35, 0.22, 0.34, light, edge=False),
        ellipse(0, 0.35, 0.09, 0.34, colour, edge=False),
        box(-0.12, 0.82, 0.12, 0.98, WOOD),
        box(-0.14, 0.8, 0.14, 0.85, darken(WOOD, 0.3), edge=False),
    ]


def mushroom(colour: Colour) -> list[Shape]:
    cream, shade = (246, 232, 206), (214, 196, 168)
    cap = [(0.46 * math.cos(t), 0.56 - 0.46 * math.sin(t)) for t in [i * math.pi / 14 for i in range(15)]]
    return [
        polygon([(-0.15, 0.52), (0.15, 0.52), (0.2, 0.98), (-0.2, 0.98)], cream),
        box(-0.16, 0.56, 0.16, 0.63, shade, edge=False),
        polygon([*cap, (-0.3, 0.62), (0.3, 0.62)], colour),
        ellipse(-0.24, 0.38, 0.085, 0.08, WHITE, edge=False),
        ellipse(0.02, 0.25, 0.1, 0.085, WHITE, edge=False),
        ellipse(0.27, 0.4, 0.08, 0.075, WHITE, edge=False),
        ellipse(0.03, 0.49, 0.065, 0.055, WHITE, edge=False),
    ]


def flower(colour: Colour) -> list[Shape]:
    stem, dark = (58, 140, 62), darken(colour, 0.18)
    petals = [
        ellipse(
            0.19 * math.cos(math.radians(a)),
            0.32 + 0.19 * math.sin(math.radians(a)),
            0.155,
            0.105,
            colour if a % 120 else dark,
            turn=a,
        )
        for a in range(0, 360, 60)
    ]
    return [
        curve([(0, 0.4), (0.02, 0.7), (0, 1.0)], 0.055, stem),
        ellipse(-0.15, 0.78, 0.15, 0.06, stem, turn=25),
        ellipse(0.16, 0.7, 0.15, 0.06, stem, turn=-25),
        *petals,
        ellipse(0, 0.32, 0.115, 0.115, YELLOW),
        ellipse(0, 0.33, 0.06, 0.06, (206, 140, 40), edge=False),
    ]


SUBJECTS: dict[str, Callable[[Colour], list[Shape]]] = {
    "cat": cat,
    "dog": dog,
    "rabbit": rabbit,
    "bird": bird,
    "robot": robot,
    "house": house,
    "car": car,
    "boat": boat,
    "rocket": rocket,
    "balloon": balloon,
    "mushroom": mushroom,
    "flower": flower,
}

COLOURS: dict[str, Colour] = {
    "red": (222, 48, 44),
    "orange": (246, 140, 34),
    "yellow": (248, 214, 56),
    "green": (58, 168, 72),
    "blue": (52, 104, 216),
    "purple": (138, 66, 182),
    "pink": (244, 132, 184),
    "white": (240, 240, 240),
    "black": (52, 50, 58),
}
