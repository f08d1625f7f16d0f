"""Two characters that the embedded base never sees: subjects for DreamBooth training and its tests.

Each keeps its own colours in every scene. Same box as the world's subjects.
"""

from collections.abc import Callable

from train_scripts.tiny_world.shapes import Colour, Shape, curve, ellipse, polygon, stroke
from train_scripts.tiny_world.subjects import BLACK, WHITE, eyes

TEAL: Colour = (28, 178, 170)
MAGENTA: Colour = (222, 44, 150)
CREAM: Colour = (255, 236, 196)
ORANGE: Colour = (244, 126, 32)
VIOLET: Colour = (92, 60, 190)


def gloop() -> list[Shape]:
    """A teal dome with one large eye, on magenta legs, with magenta horns."""
    return [
        stroke([(-0.2, 0.8), (-0.22, 0.98)], 0.13, MAGENTA),
        stroke([(0.2, 0.8), (0.22, 0.98)], 0.13, MAGENTA),
        polygon([(-0.36, 0.3), (-0.4, 0.0), (-0.14, 0.16)], MAGENTA),
        polygon([(0.36, 0.3), (0.4, 0.0), (0.14, 0.16)], MAGENTA),
        ellipse(0, 0.46, 0.42, 0.36, TEAL),
        polygon([(-0.42, 0.46), (0.42, 0.46), (0.38, 0.86), (-0.38, 0.86)], TEAL),
        ellipse(0, 0.42, 0.22, 0.22, WHITE),
        ellipse(0.02, 0.44, 0.12, 0.13, BLACK, edge=False),
        ellipse(-0.03, 0.38, 0.045, 0.045, WHITE, edge=False),
        curve([(-0.18, 0.7), (0, 0.77), (0.18, 0.7)], 0.045, BLACK, edge=False),
    ]


def zuki() -> list[Shape]:
    """A round striped dragon: orange and cream bands, violet wings and a violet crest."""
    return [
        polygon([(-0.2, 0.52), (-0.54, 0.22), (-0.5, 0.66), (-0.3, 0.68)], VIOLET),
        polygon([(0.2, 0.52), (0.54, 0.22), (0.5, 0.66), (0.3, 0.68)], VIOLET),
        polygon([(-0.16, 0.18), (-0.1, 0.0), (0, 0.12), (0.1, 0.0), (0.16, 0.18)], VIOLET),
        ellipse(-0.15, 0.95, 0.12, 0.06, VIOLET),
        ellipse(0.15, 0.95, 0.12, 0.06, VIOLET),
        ellipse(0, 0.72, 0.32, 0.26, ORANGE),
        stroke([(-0.27, 0.7), (0.27, 0.7)], 0.08, CREAM, edge=False),
        stroke([(-0.24, 0.86), (0.24, 0.86)], 0.08, CREAM, edge=False),
        ellipse(0, 0.35, 0.29, 0.24, ORANGE),
        ellipse(0, 0.45, 0.17, 0.1, CREAM, edge=False),
        *eyes(0.14, 0.3, 0.07),
        ellipse(-0.06, 0.44, 0.02, 0.02, BLACK, edge=False),
        ellipse(0.06, 0.44, 0.02, 0.02, BLACK, edge=False),
    ]


CHARACTERS: dict[str, Callable[[], list[Shape]]] = {"gloop": gloop, "zuki": zuki}
