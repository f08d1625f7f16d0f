"""Named colors: those a caption can ask for, and fixed ones such as wood and glass."""

from train_scripts.picture_world.shapes import Color

COLORS: dict[str, Color] = {
    "red": (226, 52, 48),
    "orange": (246, 140, 36),
    "yellow": (250, 212, 52),
    "green": (62, 172, 78),
    "blue": (52, 110, 222),
    "purple": (140, 72, 196),
    "pink": (248, 138, 182),
    "white": (246, 246, 242),
    "black": (50, 48, 58),
    "brown": (142, 90, 52),
}
INK: Color = (30, 26, 38)
WHITE: Color = (252, 252, 250)
CREAM: Color = (255, 240, 210)
BLUSH: Color = (246, 150, 150)
BEAK: Color = (246, 158, 44)
GLASS: Color = (176, 224, 246)
STEEL: Color = (138, 144, 158)
WOOD: Color = (140, 94, 58)
STONE: Color = (150, 150, 156)
LAMP: Color = (255, 232, 130)
LEAF: Color = (74, 160, 72)
