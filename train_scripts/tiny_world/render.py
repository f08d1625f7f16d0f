"""Pictures drawn flat: every shape filled with its colour, four times too large, then averaged down."""

import numpy as np
from PIL import Image, ImageDraw

from train_scripts.tiny_world.scene import Picture
from train_scripts.tiny_world.shapes import Colour, Shape

SIZE_PX = 64
OVERSAMPLING = 4


def draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, side: int, fill: Colour | None = None) -> None:
    """Fill the shape, or draw its stroke with round ends, on a canvas of `side` pixels."""
    colour = shape.fill if fill is None else fill
    points = [(float(x), float(y)) for x, y in shape.points * side]
    if shape.width == 0:
        draw.polygon(points, fill=colour)
        return
    width = max(1, round(shape.width * side))
    draw.line(points, fill=colour, width=width, joint="curve")
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)


def sky_canvas(sky: tuple[Colour, Colour], side: int) -> Image.Image:
    """A vertical gradient from the top colour to the horizon's."""
    t = np.clip(np.linspace(0, 1.4, side), 0, 1)[:, None, None]
    rows = (1 - t) * np.array(sky[0]) + t * np.array(sky[1])
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).round().astype(np.uint8))


def flat(picture: Picture, size_px: int = SIZE_PX) -> Image.Image:
    """The world's own style, the one the embedded base is trained on."""
    side = size_px * OVERSAMPLING
    canvas = sky_canvas(picture.sky, side)
    draw = ImageDraw.Draw(canvas)
    for shape in (*picture.scenery, *picture.subject, *picture.weather):
        draw_shape(draw, shape, side)
    return canvas.reduce(OVERSAMPLING)
