"""Ink: bold blue-black pen on cream paper, with flat grey washes.

Lines are about two pixels of 64 wide and there is no hatching: anything finer does not survive the base's autoencoder.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from train_scripts.tiny_world.render import OVERSAMPLING, SIZE_PX, draw_shape
from train_scripts.tiny_world.scene import Picture
from train_scripts.tiny_world.shapes import Colour, Points, Shape
from train_scripts.tiny_world.styles.drawing import Rng, closed, densified, draw_line, extent, layers, luma, silhouette

CREAM: Colour = (246, 236, 210)
INK: Colour = (54, 56, 88)
PALE_WASH: Colour = (222, 214, 198)
GREY_WASH: Colour = (176, 174, 178)
DEEP_WASH: Colour = (120, 122, 138)


def wobbled(points: Points, rng: Rng, amount: float = 0.006) -> Points:
    """The line as a hand draws it: pushed about by slow waves."""
    t = np.linspace(0, 1, len(points))[:, None]
    phase = rng.uniform(0, 2 * np.pi, (2, 2))
    waves = np.sin(2 * np.pi * 2 * t + phase[0]) + 0.6 * np.sin(2 * np.pi * 5 * t + phase[1])
    fade = np.minimum(1, 12 * np.minimum(t, 1 - t))
    return points + amount * waves * fade


def ink_tone(shape: Shape, layer: str) -> Colour:
    """Paper, a wash or solid ink."""
    if layer == "weather":
        return GREY_WASH
    thin = shape.width > 0 and not shape.edge
    if layer == "subject" and thin and luma(shape.fill) < 0.66:
        return INK  # thin legs and ropes have no outline of their own
    return wash_tone(luma(shape.fill), subject=layer == "subject")


def wash_tone(value: float, *, subject: bool) -> Colour:
    """The tone for a brightness: the darker the deeper, solid ink only in the subject."""
    for least, tone in ((0.66, CREAM), (0.5, PALE_WASH), (0.3, GREY_WASH)):
        if value > least:
            return tone
    return INK if subject and value < 0.16 else DEEP_WASH


def ink_sky(picture: Picture, side: int) -> Image.Image:
    """Bare paper by day, a wash that thins towards the horizon at sunset and at night."""
    depth = max(0.0, 0.62 - luma(picture.sky[0])) / 0.55
    t = np.clip(np.linspace(0, 1.5, side), 0, 1)[:, None, None]
    strength = depth * (1 - 0.55 * t)
    rows = np.array(CREAM) * (1 - strength) + np.array(DEEP_WASH) * strength
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).round().astype(np.uint8))


def outline_ink(canvas: Image.Image, shape: Shape, layer: str, rng: Rng) -> None:
    """The pen line around a shape, half of it outside; finer around small shapes so that they stay open."""
    broad, fine = (2.3, 1.7) if layer == "subject" else (1.8, 1.5)
    width = min(broad, max(fine, 0.15 * 64 * extent(shape))) / 64
    draw = ImageDraw.Draw(canvas)
    if shape.width > 0:
        draw_line(draw, shape.points, shape.width + 1.2 * width, INK, canvas.width)
    else:
        draw_line(draw, wobbled(densified(closed(shape.points)), rng), 2 * width, INK, canvas.width)


def ink(picture: Picture, rng: Rng, size_px: int = SIZE_PX) -> Image.Image:
    """Outlines in pen, brightness as washes, colour gone."""
    side = size_px * OVERSAMPLING
    canvas = ink_sky(picture, side)
    halo = silhouette(picture.subject, side).filter(ImageFilter.GaussianBlur(1.5 / 64 * side))
    for cluster, layer in layers(picture):
        if picture.subject and cluster[0] is picture.subject[0]:
            # paper left bare around the subject keeps it apart from the scenery's lines
            canvas.paste(CREAM, mask=halo.point(lambda v: 255 if v > 12 else 0))
        if cluster[-1].edge:
            for shape in cluster:
                outline_ink(canvas, shape, layer, rng)
        for shape in cluster:
            draw_shape(ImageDraw.Draw(canvas), shape, side, fill=ink_tone(shape, layer))
    return canvas.reduce(OVERSAMPLING)
