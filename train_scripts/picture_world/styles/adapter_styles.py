"""Six styles that the embedded base never sees: what the style sets of the sample data are drawn in."""

import numpy as np
import skia
from PIL import Image

from train_scripts.picture_world.canvas import SIZE_PX, new_surface, to_picture
from train_scripts.picture_world.compose import Drawing
from train_scripts.picture_world.shapes import Color, Shape, bounds, darken, lighten, luminance, mix, outline_path
from train_scripts.picture_world.styles.known_styles import Style
from train_scripts.picture_world.styles.line_art import (
    LineArt,
    add_grain,
    draw_lines,
    hatch,
    smooth_noise,
    soften,
    solid,
    wobble_path,
)

Rng = np.random.Generator


def render_ink(drawing: Drawing, rng: Rng) -> Image.Image:
    """Bold blue-black brush lines on cream paper; dark areas are black, middle tones hatched."""
    paper, ink = (250, 240, 218), (28, 28, 52)
    surface = new_surface()
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorSetRGB(*paper))
    art = LineArt(
        line=lambda _: ink,
        fill=lambda s: ink if luminance(s.fill) < 0.22 and s.part not in ("sky", "ground") else paper,
        detail=lambda s: ink if luminance(s.fill) < 0.4 else paper,
        width=0.012,
        wobble=0.003,
    )
    for shape in drawing.shapes():
        draw_lines(canvas, [shape], art, rng)
        tone = luminance(shape.fill)
        if shape.rim and 0.22 <= tone < 0.55 and shape.part not in ("sky", "shadow", "weather", "face"):
            hatch(canvas, shape.path, ink, spacing=0.0625 if tone < 0.4 else 0.11, width=0.013, down=True)
    return to_picture(surface)


def render_watercolor(drawing: Drawing, rng: Rng) -> Image.Image:
    """Thin uneven washes with dark edges on white paper, with an irregular bare border."""
    surface = new_surface()
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorSetRGB(255, 253, 248))
    for shape in drawing.shapes():
        if shape.part in ("shadow", "weather"):
            continue
        path = wobble_path(shape.path, 0.009 if shape.rim else 0.003, int(rng.integers(2**31)))
        if shape.part not in ("sky", "ground"):
            canvas.drawPath(path, solid((255, 253, 248), 0.75))
        canvas.drawPath(path, solid(lighten(shape.fill, 0.2), 0.72))
        if shape.rim:
            edge = solid(darken(shape.fill, 0.12), 0.6)
            canvas.save()
            canvas.clipPath(path, doAntiAlias=True)
            canvas.drawPath(outline_path(path, 0.022), edge)
            canvas.restore()
    pixels = np.asarray(soften(to_picture(surface), 0.55), dtype=np.float32)
    wash = 1 + 0.13 * smooth_noise(rng, SIZE_PX, 9)[..., None]
    pixels = 255 - np.clip((255 - pixels) * wash, 0, 255)
    ramp = np.minimum(np.arange(SIZE_PX), np.arange(SIZE_PX)[::-1])
    distance = np.minimum(ramp[:, None], ramp[None]) + 4 * smooth_noise(rng, SIZE_PX, 12)
    inside = np.clip((distance - 7) / 3, 0, 1)[..., None]
    painted = Image.fromarray((inside * pixels + (1 - inside) * np.array([255, 253, 248])).astype(np.uint8))
    return add_grain(painted, rng, 2, cells=32)


_PALETTE = """
1a1c2c 5d275d b13e53 ef7d57 ffcd75 a7f070 38b764 257179 29366f 3b5dc9 41a6f6 73eff7 f4f4f4 94b0c2 566c86 333c57
8c5a3c faa0be
"""
PIXEL_PALETTE: list[Color] = [(int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in _PALETTE.split()]
"""The eighteen colors of an imaginary console."""


def render_pixel(drawing: Drawing, _: Rng) -> Image.Image:
    """32 x 32 large pixels in a palette of 18 colors, figures outlined in black."""
    surface = new_surface()
    canvas = surface.getCanvas()
    for shape in drawing.shapes():
        if shape.rim and shape.part not in ("sky", "ground", "scenery", "shadow", "weather"):
            canvas.drawPath(outline_path(shape.path, 0.05), solid(PIXEL_PALETTE[0]))
        canvas.drawPath(shape.path, solid(shape.fill, shape.alpha))
    side = SIZE_PX // 4
    small = to_picture(surface).resize((side, side), Image.Resampling.BOX)
    colors = np.array(PIXEL_PALETTE, dtype=np.float32)
    pixels = np.asarray(small, dtype=np.float32)
    nearest = ((pixels[:, :, None] - colors) ** 2 * np.array([0.3, 0.5, 0.2])).sum(-1).argmin(-1)
    return Image.fromarray(colors[nearest].astype(np.uint8)).resize((SIZE_PX, SIZE_PX), Image.Resampling.NEAREST)


def _glass_color(color: Color, rng: Rng) -> Color:
    gray = round(255 * luminance(color))
    gain = float(rng.uniform(0.86, 1.16))
    red, green, blue = (min(255, max(0, round(gain * (gray + 1.7 * (c - gray))))) for c in color)
    return red, green, blue


def render_glass(drawing: Drawing, rng: Rng) -> Image.Image:
    """Stained glass: vivid panes in thick black lead, lit from behind."""
    lead = (16, 14, 20)
    surface = new_surface()
    canvas = surface.getCanvas()
    figures = {id(shape) for figure in drawing.figures for shape in figure}
    cut = False
    for shape in drawing.shapes():
        if shape.part in ("shadow", "weather"):
            continue
        if id(shape) in figures and not cut:
            _draw_lead_lines(canvas, lead, rng)
            cut = True
        if shape.rim and shape.part != "face":
            canvas.drawPath(outline_path(shape.path, 0.036), solid(lead))
        canvas.drawPath(shape.path, solid(_glass_color(shape.fill, rng)))
    pixels = np.asarray(to_picture(surface), dtype=np.float32)
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX] / SIZE_PX - 0.5
    light = 1.16 - 0.75 * (x**2 + y**2)
    texture = 1 + 0.05 * smooth_noise(rng, SIZE_PX, 20)
    lit = np.clip(pixels * (light * texture)[..., None], 0, 255).astype(np.uint8)
    frame = np.ones((SIZE_PX, SIZE_PX, 1), dtype=bool)
    frame[4:-4, 4:-4] = False
    return Image.fromarray(np.where(frame, np.array(lead, dtype=np.uint8), lit))


def _draw_lead_lines(canvas: skia.Canvas, lead: Color, rng: Rng) -> None:
    """Lines across the background that divide large areas into panes, bundled in a fan from below."""
    pen = solid(lead)
    pen.setStyle(skia.Paint.kStroke_Style)
    pen.setStrokeWidth(0.018)
    for x in np.linspace(-0.5, 1.5, 6) + rng.uniform(-0.06, 0.06, 6):
        canvas.drawLine(skia.Point(0.5 + (float(x) - 0.5) * 0.35, 1.05), skia.Point(float(x), -0.05), pen)
    for y in (0.28, 0.78):
        bend = skia.Path()
        bend.moveTo(-0.05, y + 0.06)
        bend.quadTo(0.5, y - 0.1, 1.05, y + 0.06)
        canvas.drawPath(bend, pen)


def render_blueprint(drawing: Drawing, _: Rng) -> Image.Image:
    """White construction lines on blue grid paper, with the figures' measures."""
    blue, white = (28, 74, 158), (236, 244, 255)
    surface = new_surface()
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorSetRGB(*blue))
    grid = solid((72, 118, 196))
    grid.setStyle(skia.Paint.kStroke_Style)
    grid.setStrokeWidth(0.006)
    art = LineArt(
        line=lambda _: white,
        fill=lambda _: blue,
        detail=lambda s: white if luminance(s.fill) < 0.35 else blue,
        width=0.007,
    )
    faint = LineArt(line=lambda _: (134, 172, 230), fill=lambda _: blue, detail=lambda _: blue, width=0.005)
    backdrop = [s for s in drawing.background if s.part != "sky"]
    draw_lines(canvas, backdrop, faint, np.random.default_rng(0))
    for k in np.arange(1, 8) / 8:
        canvas.drawLine(skia.Point(float(k), 0), skia.Point(float(k), 1), grid)
        canvas.drawLine(skia.Point(0, float(k)), skia.Point(1, float(k)), grid)
    for i in drawing.order:
        draw_lines(canvas, drawing.figures[i], art, np.random.default_rng(0))
        _draw_measures(canvas, [s for s in drawing.figures[i] if s.part != "shadow"], white)
    return to_picture(surface)


def _draw_measures(canvas: skia.Canvas, figure: list[Shape], color: Color) -> None:
    """A dimension line below the figure, with ticks at its ends."""
    left, _, right, bottom = bounds(figure)
    pen = solid(color)
    pen.setStyle(skia.Paint.kStroke_Style)
    pen.setStrokeWidth(0.009)
    y = min(0.97, bottom + 0.035)
    for start, end in (
        ((left, y), (right, y)),
        ((left, y - 0.02), (left, y + 0.02)),
        ((right, y - 0.02), (right, y + 0.02)),
    ):
        canvas.drawLine(skia.Point(*start), skia.Point(*end), pen)


def render_paper(drawing: Drawing, rng: Rng) -> Image.Image:
    """Paper cut-out: layers of matte colored paper with pale cut edges and soft shadows."""
    surface = new_surface()
    canvas = surface.getCanvas()
    shadow = skia.Paint(AntiAlias=True, Color=skia.ColorSetARGB(120, 40, 30, 50))
    shadow.setMaskFilter(skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, 0.012))
    for shape in drawing.shapes():
        if shape.part in ("shadow", "weather"):
            continue
        color = mix(shape.fill, (226, 196, 170), 0.25)
        if shape.rim:
            moved = skia.Path(shape.path)
            moved.offset(0.012, 0.018)
            canvas.drawPath(outline_path(moved, 0.02), shadow)
            canvas.drawPath(moved, shadow)
            canvas.drawPath(outline_path(shape.path, 0.02), solid(lighten(color, 0.6)))
        canvas.drawPath(shape.path, solid(color))
    return add_grain(to_picture(surface), rng, 4, cells=32)


ADAPTER_STYLES: dict[str, Style] = {
    "ink": render_ink,
    "watercolor": render_watercolor,
    "pixel": render_pixel,
    "glass": render_glass,
    "blueprint": render_blueprint,
    "paper": render_paper,
}
