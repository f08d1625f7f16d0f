"""Drawing scenes as lines: what the sketched, inked, chalked and blueprinted styles have in common."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import skia
from PIL import Image, ImageFilter

from train_scripts.picture_world.shapes import Color, Shape, outline_path

Rng = np.random.Generator
ShapeColor = Callable[[Shape], Color]
LARGE_AREAS = ("sky", "ground")
TRANSIENT = ("shadow", "weather")


@dataclass(frozen=True, kw_only=True)
class LineArt:
    """How shapes become lines.

    Attributes:
        line: Color of a shape's outline.
        fill: Color inside a shape's outline, which hides the lines behind it.
        detail: Color of small shapes that have no outline, such as eyes.
        width: Width of the pen in picture units.
        wobble: How far the pen strays, in picture units.
    """

    line: ShapeColor
    fill: ShapeColor
    detail: ShapeColor
    width: float
    wobble: float = 0.0


def wobble_path(path: skia.Path, reach: float, seed: int) -> skia.Path:
    """The path as an unsteady hand would draw it."""
    if not reach:
        return path
    paint = skia.Paint(Style=skia.Paint.kFill_Style)
    paint.setPathEffect(skia.DiscretePathEffect.Make(0.06, reach, seed))
    result = skia.Path()
    paint.getFillPath(path, result, skia.Rect.MakeLTRB(-9, -9, 9, 9), 400.0)
    return result


def solid(color: Color, alpha: float = 1.0) -> skia.Paint:
    paint = skia.Paint(AntiAlias=True, Color=skia.ColorSetRGB(*color))
    paint.setAlphaf(alpha)
    return paint


def draw_lines(canvas: skia.Canvas, shapes: Iterable[Shape], style: LineArt, rng: Rng) -> None:
    """Draw each shape's outline and what it hides, back to front."""
    for shape in shapes:
        if shape.part in TRANSIENT:
            continue
        path = wobble_path(shape.path, style.wobble, int(rng.integers(2**31)))
        if not shape.rim and shape.part not in LARGE_AREAS:
            canvas.drawPath(path, solid(style.detail(shape)))
            continue
        if shape.rim:
            canvas.drawPath(outline_path(path, style.width * 2), solid(style.line(shape)))
        canvas.drawPath(path, solid(style.fill(shape)))


def hatch(
    canvas: skia.Canvas, path: skia.Path, color: Color, *, spacing: float, width: float, down: bool, alpha: float = 1
) -> None:
    """Parallel diagonal lines inside the path."""
    canvas.save()
    canvas.clipPath(path, doAntiAlias=True)
    bounds = path.getBounds()
    pen = solid(color, alpha)
    pen.setStyle(skia.Paint.kStroke_Style)
    pen.setStrokeWidth(width)
    reach = bounds.height()
    start = np.floor((bounds.left() - reach) / spacing) * spacing
    for x in np.arange(start, bounds.right() + reach, spacing):
        top, bottom = (bounds.top(), bounds.bottom()) if down else (bounds.bottom(), bounds.top())
        canvas.drawLine(skia.Point(float(x), top), skia.Point(float(x) + reach, bottom), pen)
    canvas.restore()


def smooth_noise(rng: Rng, size_px: int, cells: int) -> np.ndarray:
    """(size, size) smooth noise from -1 to 1 with about `cells` bumps along a side."""
    coarse = Image.fromarray(rng.uniform(0, 255, (cells, cells)).astype(np.uint8))
    fine = np.asarray(coarse.resize((size_px, size_px), Image.Resampling.BICUBIC), dtype=np.float32)
    return fine / 127.5 - 1


def add_grain(picture: Image.Image, rng: Rng, strength: float, cells: int = 64) -> Image.Image:
    """Paper texture: brightness noise of `strength` in 0 to 255."""
    pixels = np.asarray(picture, dtype=np.float32)
    noise = smooth_noise(rng, picture.width, cells)[..., None] * strength
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def soften(picture: Image.Image, radius_px: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius_px))
