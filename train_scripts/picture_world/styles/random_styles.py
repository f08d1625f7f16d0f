"""Lines, tiles, papers and palettes at random: what makes an autoencoder carry any style.

None of the adapters' styles is among them; their lines, hatching and tiles are of the same kinds.
"""

import numpy as np
import skia
from PIL import Image, ImageOps

from train_scripts.picture_world.canvas import SIZE_PX, fill_shapes, new_surface, to_picture
from train_scripts.picture_world.compose import Drawing
from train_scripts.picture_world.shapes import Color, Shape, blob, ellipse, line, luminance, mix, outline_path, polygon
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.line_art import LineArt, add_grain, draw_lines, hatch, soften

Rng = np.random.Generator


def random_color(rng: Rng, level: float = 128, spread: float = 90) -> Color:
    """A color whose channels are normally distributed around `level`."""
    red, green, blue = np.clip(rng.normal(level, spread, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def random_points(rng: Rng, count: int, reach: float) -> list[tuple[float, float]]:
    center, offsets = rng.uniform(0, 1, 2), rng.uniform(-reach, reach, (count, 2))
    return [(float(x), float(y)) for x, y in center + offsets]


def random_shape(rng: Rng, color: Color) -> Shape:
    """A curve, a ring, a polygon or a blob."""
    points = random_points(rng, int(rng.integers(3, 7)), float(rng.uniform(0.06, 0.4)))
    width = float(rng.uniform(0.008, 0.04))
    kind = rng.random()
    if kind < 0.4:
        return line(points, width, color, smooth=bool(rng.integers(2)))
    if kind < 0.6:
        (x, y), (rx, ry) = points[0], rng.uniform(0.02, 0.3, 2)
        ring = ellipse(x, y, float(rx), float(ry), color)
        return ring if rng.random() < 0.4 else Shape(path=outline_path(ring.path, width), fill=color)
    return (polygon if rng.random() < 0.5 else blob)(points, color)


def render_scribble(rng: Rng) -> Image.Image:
    """Random curves, rings and areas on light, dark or colored ground."""
    surface = new_surface()
    canvas = surface.getCanvas()
    light = rng.random() < 0.55
    canvas.clear(skia.ColorSetRGB(*random_color(rng, 225 if light else 40, 35)))
    for _ in range(int(rng.integers(6, 24))):
        shape = random_shape(rng, random_color(rng, 70 if light else 190, 70))
        fill_shapes(canvas, [shape])
        if rng.random() < 0.2:
            _hatch_at_random(canvas, shape, random_color(rng), rng)
    return to_picture(surface)


def _hatch_at_random(canvas: skia.Canvas, shape: Shape, color: Color, rng: Rng) -> None:
    spacing = float(rng.uniform(0.035, 0.09))
    hatch(
        canvas,
        shape.path,
        color,
        spacing=spacing,
        width=spacing * float(rng.uniform(0.15, 0.5)),
        down=bool(rng.integers(2)),
    )


def render_random_lines(drawing: Drawing, rng: Rng) -> Image.Image:
    """The scene as line art with pens, papers and fillings drawn at random."""
    dark_ground = rng.random() < 0.4
    paper = random_color(rng, 45 if dark_ground else 225, 40)
    pen = random_color(rng, 200 if dark_ground else 50, 45)
    keep_color, keep_line = float(rng.choice([0.0, 0.0, 0.3, 0.7, 1.0])), float(rng.choice([0.0, 0.0, 0.5, 1.0]))
    art = LineArt(
        line=lambda s: mix(pen, s.fill, keep_line),
        fill=lambda s: mix(paper, s.fill, keep_color),
        detail=lambda s: pen if (luminance(s.fill) < 0.45) != dark_ground else paper,
        width=float(rng.uniform(0.004, 0.02)),
        wobble=float(rng.choice([0.0, 0.003, 0.007])),
    )
    hatched, reach = rng.random() < 0.4, float(rng.uniform(0.2, 0.7))
    ink = mix(pen, paper, float(rng.uniform(0, 0.6)))
    surface = new_surface()
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorSetRGB(*paper))
    for shape in drawing.shapes():
        draw_lines(canvas, [shape], art, rng)
        if hatched and shape.rim and luminance(shape.fill) < reach and shape.part not in ("sky", "weather", "shadow"):
            _hatch_at_random(canvas, shape, ink, rng)
    return to_picture(surface)


def render_random_tiles(drawing: Drawing, rng: Rng) -> Image.Image:
    """The flat scene in large pixels with few tones."""
    block = int(rng.choice([2, 3, 4, 4, 6, 8]))
    side = -(-SIZE_PX // block)
    small = render_flat(drawing).resize((side, side), Image.Resampling.BOX)
    if rng.random() < 0.6:
        small = small.quantize(int(rng.integers(5, 24)), dither=Image.Dither.NONE).convert("RGB")
    return small.resize((side * block, side * block), Image.Resampling.NEAREST).crop((0, 0, SIZE_PX, SIZE_PX))


def recolor(picture: Image.Image, rng: Rng) -> Image.Image:
    """Channels permuted, contrast and brightness changed, sometimes inverted, gray, tinted, grained or blurred."""
    pixels = np.asarray(picture, dtype=np.float32)[..., rng.permutation(3)]
    if rng.random() < 0.3:
        pixels = 255 - pixels
    if rng.random() < 0.2:
        pixels = pixels.mean(axis=2, keepdims=True) * np.ones(3) * rng.uniform(0.7, 1.1, 3)
    pixels = (pixels - 128) * rng.uniform(0.5, 1.4) + 128 + rng.uniform(-40, 40, 3)
    result = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        result = add_grain(result, rng, float(rng.uniform(2, 8)), cells=int(rng.integers(8, 48)))
    return soften(result, float(rng.uniform(0.4, 1.5))) if rng.random() < 0.2 else result


def flip(picture: Image.Image, rng: Rng) -> Image.Image:
    picture = ImageOps.mirror(picture) if rng.random() < 0.5 else picture
    return ImageOps.flip(picture) if rng.random() < 0.1 else picture
