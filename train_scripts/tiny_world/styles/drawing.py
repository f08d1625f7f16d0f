"""What the styles share: masks, lines and the order in which shapes are drawn."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from train_scripts.tiny_world.render import draw_shape
from train_scripts.tiny_world.scene import Picture
from train_scripts.tiny_world.shapes import Colour, Points, Shape

Rng = np.random.Generator


def luma(colour: Colour) -> float:
    """Perceived brightness in 0..1 (Rec. 601)."""
    r, g, b = colour
    return (0.299 * r + 0.587 * g + 0.114 * b) / 255


def extent(shape: Shape) -> float:
    """The longer side of the shape's bounding box."""
    return float(np.ptp(shape.points, axis=0).max()) + shape.width


def clusters(shapes: tuple[Shape, ...]) -> Iterator[tuple[Shape, ...]]:
    """Runs of one colour that end with the first edged shape: the puffs of a cloud are one thing."""
    run: tuple[Shape, ...] = ()
    for shape in shapes:
        if run and (run[-1].edge or run[-1].fill != shape.fill):
            yield run
            run = ()
        run = (*run, shape)
    if run:
        yield run


def layers(picture: Picture) -> Iterator[tuple[tuple[Shape, ...], str]]:
    """All clusters back to front, each with the layer it belongs to."""
    for name in ("scenery", "subject", "weather"):
        for cluster in clusters(getattr(picture, name)):
            yield cluster, name


def silhouette(shapes: Iterable[Shape], side: int) -> Image.Image:
    """A mask of everything that the shapes cover."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for shape in shapes:
        draw_shape(draw, shape, side, fill=255)  # type: ignore[arg-type]
    return mask


def smooth_noise(rng: Rng, side: int, radius: float) -> np.ndarray:
    """Blurred white noise stretched to 0..1, `radius` in pixels of the canvas."""
    grain = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))
    values = np.asarray(grain.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)
    return (values - values.min()) / max(1.0, float(np.ptp(values)))


def densified(points: Points, step: float = 0.02) -> Points:
    """The line with extra points, so that no piece of it is longer than about `step`."""
    parts = []
    for a, b in pairwise(points):
        n = max(1, int(np.hypot(*(b - a)) / step))
        parts.append(a + (b - a) * np.linspace(0, 1, n, endpoint=False)[:, None])
    return np.concatenate([*parts, points[-1:]])


def draw_line(draw: ImageDraw.ImageDraw, points: Points, width: float, colour: Colour, side: int) -> None:
    """A polyline with round joints and ends; `width` as a fraction of the side."""
    pixels = [(float(x), float(y)) for x, y in points * side]
    radius = width * side / 2
    draw.line(pixels, fill=colour, width=max(1, round(2 * radius)), joint="curve")
    for x, y in pixels:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def closed(points: Points) -> Points:
    return np.concatenate([points, points[:1]])
