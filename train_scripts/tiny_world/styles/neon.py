"""Neon: glowing tubes along the outlines on a black-violet ground."""

import colorsys
from dataclasses import replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from train_scripts.tiny_world.render import OVERSAMPLING, SIZE_PX, draw_shape
from train_scripts.tiny_world.scene import Picture
from train_scripts.tiny_world.shapes import Colour, Shape, darken, mix
from train_scripts.tiny_world.styles.drawing import (
    Rng,
    closed,
    draw_line,
    extent,
    layers,
    luma,
)

VOID: Colour = (20, 7, 42)
ICE: Colour = (206, 232, 255)
ELECTRIC: Colour = (150, 104, 255)


def glowing(colour: Colour) -> Colour:
    """The colour as a gas tube shows it: its hue at full strength, ice for whites, violet for greys."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    if saturation < 0.22:
        return ICE if value > 0.7 else ELECTRIC
    r, g, b = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, max(0.85, saturation), 1.0))
    return r, g, b


def neon_sky(picture: Picture, side: int) -> Image.Image:
    """Near black, with the sky's own hue glimmering at the horizon."""
    t = np.clip(np.linspace(-0.2, 1.3, side), 0, 1)[:, None, None] ** 2
    rows = np.array(VOID) * (1 - 0.3 * t) + 0.3 * t * np.array(glowing(picture.sky[1]))
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).round().clip(0, 255).astype(np.uint8))


def tube_colour(shape: Shape, layer: str) -> Colour:
    """The subject burns brighter than what is around it."""
    return glowing(shape.fill) if layer == "subject" else darken(glowing(shape.fill), 0.35)


def is_lamp(shape: Shape, layer: str) -> bool:
    """Whether a shape without an outline is small or thin enough to shine as a whole."""
    thin = shape.width > 0 and layer == "subject"
    return not shape.edge and luma(shape.fill) > 0.2 and (thin or extent(shape) < 0.13)


def outline_tube(tubes: ImageDraw.ImageDraw, shape: Shape, layer: str, side: int) -> None:
    """A bright line around the shape; for a stroke, what is left of it when its middle is taken out later."""
    width = (2.3 if layer == "subject" else 1.8) / 64
    if shape.width > 0:
        draw_line(tubes, shape.points, shape.width + 0.5 * width, tube_colour(shape, layer), side)
    else:
        draw_line(tubes, closed(shape.points), 1.5 * width, tube_colour(shape, layer), side)


def draw_tubes(
    body: ImageDraw.ImageDraw, tubes: ImageDraw.ImageDraw, cluster: tuple[Shape, ...], layer: str, side: int
) -> None:
    """Nearly black bodies that hide what is behind them, and a bright outline around them together."""
    black: Colour = (0, 0, 0)
    outlined = cluster[-1].edge
    for shape in cluster if outlined else ():
        outline_tube(tubes, shape, layer, side)
    for shape in cluster:
        bright = tube_colour(shape, layer)
        draw_shape(body, shape, side, fill=mix(VOID, bright, 0.12 if shape.edge else 0.22))
        inside = inset(shape, 1.1 / 64) if outlined else shape
        draw_shape(tubes, inside, side, fill=bright if is_lamp(shape, layer) and not outlined else black)


def inset(shape: Shape, amount: float) -> Shape:
    """The shape made smaller by `amount` on every side, roughly."""
    if shape.width > 0:
        return replace(shape, width=max(0.001, shape.width - 2 * amount))
    middle = (shape.points.min(axis=0) + shape.points.max(axis=0)) / 2
    half = np.maximum(np.ptp(shape.points, axis=0) / 2, 1e-6)
    return replace(shape, points=middle + (shape.points - middle) * np.maximum(0, 1 - amount / half))


def neon(picture: Picture, rng: Rng, size_px: int = SIZE_PX) -> Image.Image:
    """Glowing tubes on black violet, with bloom; `rng` varies how brightly the sign burns."""
    side = size_px * OVERSAMPLING
    canvas = neon_sky(picture, side)
    tubes = Image.new("RGB", (side, side))
    for cluster, layer in layers(picture):
        draw_tubes(ImageDraw.Draw(canvas), ImageDraw.Draw(tubes), cluster, layer, side)
    canvas = ImageChops.lighter(canvas, tubes)
    power = float(rng.uniform(0.9, 1.1))
    for radius_px, gain in ((1.0, 0.5), (3.5, 0.9)):
        bloom = tubes.filter(ImageFilter.GaussianBlur(radius_px / 64 * side))
        canvas = ImageChops.screen(canvas, bloom.point(lambda v, k=gain * power: min(255, round(v * k))))
    return canvas.reduce(OVERSAMPLING)
