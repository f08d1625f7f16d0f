"""Styles that the embedded base learns by name, so that it can draw lines, textures and unusual palettes.

They are related to the styles of the sample sets (`adapter_styles.py`), but none of those is among them.
"""

from collections.abc import Callable

import numpy as np
import skia
from PIL import Image, ImageChops, ImageOps

from train_scripts.picture_world.canvas import SIZE_PX, fill_shapes, new_surface, to_picture
from train_scripts.picture_world.compose import Drawing
from train_scripts.picture_world.shapes import Color, Shape, darken, lighten, luminance, mix, outline_path
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.line_art import LineArt, add_grain, draw_lines, hatch, soften, solid

Rng = np.random.Generator
Style = Callable[[Drawing, Rng], Image.Image]


def render_sketch(drawing: Drawing, rng: Rng) -> Image.Image:
    """Thin gray pencil lines on white paper, dark areas hatched."""
    paper, pencil = (250, 250, 247), (92, 92, 100)
    art = LineArt(
        line=lambda _: pencil,
        fill=lambda _: paper,
        detail=lambda s: mix(pencil, paper, luminance(s.fill)),
        width=0.006,
        wobble=0.004,
    )
    surface = new_surface()
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorSetRGB(*paper))
    for shape in drawing.shapes():
        draw_lines(canvas, [shape], art, rng)
        if shape.rim and luminance(shape.fill) < 0.55 and shape.part not in ("sky", "shadow", "weather"):
            hatch(canvas, shape.path, (168, 168, 174), spacing=0.047, width=0.008, down=True)
    return add_grain(to_picture(surface), rng, 3, cells=32)


def render_chalk(drawing: Drawing, rng: Rng) -> Image.Image:
    """Colored chalk outlines on a green board."""
    board = (44, 74, 64)
    art = LineArt(
        line=lambda s: lighten(s.fill, 0.45),
        fill=lambda s: board if s.part in ("sky", "ground") else mix(board, lighten(s.fill, 0.2), 0.28),
        detail=lambda s: lighten(s.fill, 0.35) if luminance(s.fill) > 0.3 else board,
        width=0.011,
        wobble=0.004,
    )
    surface = new_surface()
    surface.getCanvas().clear(skia.ColorSetRGB(*board))
    draw_lines(surface.getCanvas(), drawing.shapes(), art, rng)
    return add_grain(to_picture(surface), rng, 6, cells=32)


def _vivid(color: Color) -> Color:
    gray = round(255 * luminance(color))
    red, green, blue = (min(255, max(0, round(gray + 1.35 * (c - gray)))) for c in color)
    return red, green, blue


def render_comic(drawing: Drawing, _: Rng) -> Image.Image:
    """Thick black outlines around vivid flat colors, dots in the sky."""
    ink = (22, 18, 26)
    surface = new_surface()
    canvas = surface.getCanvas()
    for shape in drawing.shapes():
        if shape.rim and shape.part not in ("shadow", "sky"):
            canvas.drawPath(outline_path(shape.path, 0.022), solid(ink))
        canvas.drawPath(shape.path, solid(_vivid(shape.fill), shape.alpha))
        if shape.part == "sky" and shape.fill_to is not None:
            dot = solid(_vivid(shape.fill_to))
            for row in range(14):
                for column in range(-1, 17):
                    canvas.drawCircle((column + row % 2 / 2) / 16, row / 20, 0.004 + 0.0011 * row, dot)
    return to_picture(surface)


def render_crayon(drawing: Drawing, rng: Rng) -> Image.Image:
    """Colored strokes on white paper, with uneven colored outlines."""
    paper = (252, 250, 244)
    surface = new_surface()
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorSetRGB(*paper))
    for shape in drawing.shapes():
        if shape.part == "shadow":
            continue
        if not shape.rim and shape.part not in ("sky", "ground"):
            canvas.drawPath(shape.path, solid(shape.fill, shape.alpha))
            continue
        canvas.drawPath(shape.path, solid(lighten(shape.fill, 0.55)))
        down = bool(rng.integers(2))
        hatch(canvas, shape.path, shape.fill, spacing=0.0625, width=0.031, down=down, alpha=0.75)
        if shape.rim:
            canvas.drawPath(outline_path(shape.path, 0.016), solid(darken(shape.fill, 0.2)))
    return add_grain(to_picture(surface), rng, 4, cells=32)


def render_mosaic(drawing: Drawing, rng: Rng) -> Image.Image:
    """Square tiles of 4 px with pale joints, each a little lighter or darker."""
    side = SIZE_PX // 4
    small = np.asarray(render_flat(drawing).resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    small = np.clip(small * rng.uniform(0.95, 1.05, (side, side, 1)), 0, 255)
    tiles = np.repeat(np.repeat(small, 4, axis=0), 4, axis=1)
    joints = np.zeros((SIZE_PX, SIZE_PX, 1), dtype=bool)
    joints[3::4] = joints[:, 3::4] = True
    return Image.fromarray(np.where(joints, 0.55 * tiles + 0.45 * 214, tiles).astype(np.uint8))


def render_pastel(drawing: Drawing, rng: Rng) -> Image.Image:
    """Soft pale areas without outlines."""
    surface = new_surface()
    pale = [
        Shape(
            path=s.path,
            fill=lighten(s.fill, 0.4),
            alpha=s.alpha,
            fill_to=lighten(s.fill_to, 0.45) if s.fill_to else None,
        )
        for s in drawing.shapes()
    ]
    fill_shapes(surface.getCanvas(), pale)
    return add_grain(soften(to_picture(surface), 0.9), rng, 3, cells=32)


def render_gray(drawing: Drawing, _: Rng) -> Image.Image:
    """The flat picture in grays."""
    return ImageOps.autocontrast(render_flat(drawing).convert("L"), cutoff=1).convert("RGB")


def _glowing(color: Color) -> Color:
    """The color at full brightness."""
    top = max(*color, 1)
    red, green, blue = (round(255 * c / top) for c in color)
    return lighten((red, green, blue), 0.12)


def render_neon(drawing: Drawing, rng: Rng) -> Image.Image:
    """Glowing colored tubes on near black."""
    night = (14, 12, 28)
    art = LineArt(
        line=lambda s: mix(night, _glowing(s.fill), 0.4 if s.part in ("scenery", "ground") else 1.0),
        fill=lambda _: night,
        detail=lambda s: mix(night, _glowing(s.fill), 1.0 if s.glows else 0.35) if luminance(s.fill) > 0.5 else night,
        width=0.009,
    )
    surface = new_surface()
    surface.getCanvas().clear(skia.ColorSetRGB(*night))
    draw_lines(surface.getCanvas(), drawing.shapes(), art, rng)
    picture = to_picture(surface)
    glow = soften(picture, 3.5).point([min(255, round(v * 1.5)) for v in range(256)] * 3)
    return ImageChops.screen(picture, glow)


KNOWN_STYLES: dict[str, Style] = {
    "sketch": render_sketch,
    "chalk": render_chalk,
    "comic": render_comic,
    "crayon": render_crayon,
    "mosaic": render_mosaic,
    "pastel": render_pastel,
    "gray": render_gray,
    "neon": render_neon,
}
