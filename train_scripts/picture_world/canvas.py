"""Skia surfaces as Pillow pictures: the one place where shapes become pixels."""

from collections.abc import Iterable

import numpy as np
import skia
from PIL import Image

from train_scripts.picture_world.shapes import Shape

SIZE_PX = 128


def new_surface(size_px: int = SIZE_PX) -> skia.Surface:
    """A transparent surface whose canvas takes picture coordinates from 0 to 1."""
    surface = skia.Surface(size_px, size_px)
    surface.getCanvas().scale(size_px, size_px)
    return surface


def fill_paint(shape: Shape) -> skia.Paint:
    """Anti-aliased paint with the shape's color, gradient and opacity."""
    paint = skia.Paint(AntiAlias=True, Color=skia.ColorSetRGB(*shape.fill))
    if shape.fill_to is not None:
        bounds = shape.path.getBounds()
        ends = [skia.Point(0, bounds.top()), skia.Point(0, bounds.bottom())]
        colors = [skia.ColorSetRGB(*shape.fill), skia.ColorSetRGB(*shape.fill_to)]
        paint.setShader(skia.GradientShader.MakeLinear(ends, colors))
    paint.setAlphaf(shape.alpha)
    return paint


def fill_shapes(canvas: skia.Canvas, shapes: Iterable[Shape]) -> None:
    for shape in shapes:
        canvas.drawPath(shape.path, fill_paint(shape))


def to_picture(surface: skia.Surface) -> Image.Image:
    """The surface over white, as RGB."""
    pixels = surface.makeImageSnapshot().toarray(colorType=skia.kRGBA_8888_ColorType)
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))


def to_alpha(surface: skia.Surface) -> Image.Image:
    """The opacity of the surface as a mask."""
    pixels = surface.makeImageSnapshot().toarray(colorType=skia.kRGBA_8888_ColorType)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 3]))
