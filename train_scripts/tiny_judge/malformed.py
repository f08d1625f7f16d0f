"""Pictures whose subject is spoilt: doubled heads, missing parts, smears. A reader must not take them for the subject.

Each function draws one kind from a scene with a single figure; the rest of the picture stays as it is.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import skia
from PIL import Image, ImageChops, ImageFilter

from train_scripts.picture_world.canvas import SIZE_PX, new_surface, to_alpha
from train_scripts.picture_world.compose import Drawing, compose, without_figures
from train_scripts.picture_world.figures.subjects import SUBJECTS
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.scene import Scene, choose
from train_scripts.picture_world.shapes import Shape, blob, bounds, box, darken, ellipse, lighten, transform_shapes

Rng = np.random.Generator
Draw = Callable[[Drawing], Image.Image]
"""A style that draws the same picture each time."""
HEAD_PARTS = ("head", "face", "ears", "hat", "horns", "crest")


def with_figure(drawing: Drawing, shapes: Iterable[Shape]) -> Drawing:
    """The drawing with other shapes in place of its first figure."""
    return replace(drawing, figures=(tuple(shapes), *drawing.figures[1:]))


def figure_shapes(drawing: Drawing) -> list[Shape]:
    """Shapes of the first figure without its shadow."""
    return [shape for shape in drawing.figures[0] if shape.part != "shadow"]


def figure_mask(drawing: Drawing, grow: float = 0.0) -> Image.Image:
    """255 where the first figure stands."""
    surface = new_surface()
    for shape in figure_shapes(drawing):
        surface.getCanvas().drawPath(shape.path, skia.Paint(AntiAlias=True))
    mask = to_alpha(surface)
    return mask.filter(ImageFilter.MaxFilter(2 * round(grow * SIZE_PX) + 1)) if grow else mask


def figure_box_px(drawing: Drawing) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(SIZE_PX * edge) for edge in bounds(figure_shapes(drawing)))
    return max(0, left), max(0, top), min(SIZE_PX, right), min(SIZE_PX, bottom)


def double_head(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """A second head beside the first, or for things without one a second copy that overlaps half."""
    drawing = compose(scene)
    shapes = figure_shapes(drawing)
    head = [shape for shape in shapes if shape.part in HEAD_PARTS] or shapes
    left, top, right, bottom = bounds(head)
    side = 1 if rng.random() < 0.5 else -1
    reach = side * (right - left) * float(rng.uniform(0.45, 0.75))
    lift = (bottom - top) * float(rng.uniform(-0.2, 0.15))
    second = transform_shapes(head, skia.Matrix.Translate(reach, lift))
    return draw(with_figure(drawing, [*drawing.figures[0], *second]))


def drop_parts(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """Parts that make up a third to two thirds of the figure are missing."""
    drawing = compose(scene)
    parts: dict[str, list[Shape]] = defaultdict(list)
    for shape in figure_shapes(drawing):
        parts["head" if shape.part in HEAD_PARTS else shape.part].append(shape)
    areas = {name: _area(shapes) for name, shapes in parts.items()}
    whole, gone, kept = sum(areas.values()), 0.0, dict(parts)
    for name in rng.permutation(sorted(parts, key=lambda n: -areas[n])[:3]):
        if gone >= whole / 3 or len(kept) == 1:
            break
        gone += areas[str(name)]
        del kept[str(name)]
    if gone < whole / 4:
        return half_erased(scene, rng, draw)
    names = {id(shape) for shapes in kept.values() for shape in shapes}
    return draw(with_figure(drawing, [s for s in drawing.figures[0] if id(s) in names or s.part == "shadow"]))


def _area(shapes: list[Shape]) -> float:
    left, top, right, bottom = bounds(shapes)
    return (right - left) * (bottom - top)


def half_erased(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """One half of the figure is gone."""
    drawing = compose(scene)
    picture, empty = draw(drawing), draw(without_figures(drawing))
    left, top, right, bottom = figure_box_px(drawing)
    share = float(rng.uniform(0.45, 0.6))
    kind = int(rng.integers(3))
    if kind == 0:
        area = (0, 0, round(left + share * (right - left)), SIZE_PX)
    elif kind == 1:
        area = (round(right - share * (right - left)), 0, SIZE_PX, SIZE_PX)
    else:
        area = (0, 0, SIZE_PX, round(top + share * (bottom - top)))
    picture.paste(empty.crop(area), area[:2])
    return picture


def erase(scene: Scene, _: Rng, draw: Draw) -> Image.Image:
    return draw(without_figures(compose(scene)))


def smear(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """The figure dragged sideways or blurred away inside a sharp picture."""
    drawing = compose(scene)
    picture = draw(drawing)
    mask = figure_mask(drawing, 0.03).filter(ImageFilter.GaussianBlur(1))
    if rng.random() < 0.5:
        return Image.composite(picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(5, 9)))), picture, mask)
    reach = int(rng.integers(14, 30))
    pixels = np.asarray(picture, dtype=np.float32)
    axis = int(rng.integers(2))
    dragged = np.mean([np.roll(pixels, k, axis=axis) for k in range(-reach // 2, reach // 2, 2)], axis=0)
    return Image.composite(Image.fromarray(dragged.astype(np.uint8)), picture, mask)


def blur_all(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    return draw(compose(scene)).filter(ImageFilter.GaussianBlur(float(rng.uniform(7, 11))))


def warp(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """The figure bent out of shape by a strong smooth distortion."""
    drawing = compose(scene)
    pixels = np.asarray(draw(drawing))
    left, top, right, bottom = figure_box_px(drawing)
    reach = 0.28 * max(right - left, bottom - top)
    grid = rng.uniform(-reach, reach, (2, 6, 6)).astype(np.float32)
    shift = [np.asarray(Image.fromarray(g).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)) for g in grid]
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX]
    rows = np.clip(y + shift[0], 0, SIZE_PX - 1).astype(int)
    columns = np.clip(x + shift[1], 0, SIZE_PX - 1).astype(int)
    mask = figure_mask(drawing, 0.06).filter(ImageFilter.GaussianBlur(3))
    return Image.composite(Image.fromarray(pixels[rows, columns]), Image.fromarray(pixels), mask)


def shuffle_tiles(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """The figure cut into tiles that are put together in random order."""
    drawing = compose(scene)
    pixels = np.array(draw(drawing))
    left, top, right, bottom = figure_box_px(drawing)
    tile = max(8, (right - left) // 4)
    corners = [(y, x) for y in range(top, bottom - tile + 1, tile) for x in range(left, right - tile + 1, tile)]
    pieces = [pixels[y : y + tile, x : x + tile].copy() for y, x in corners]
    for (y, x), i in zip(corners, rng.permutation(len(pieces)), strict=True):
        pixels[y : y + tile, x : x + tile] = pieces[i]
    return Image.fromarray(pixels)


def replace_by_blobs(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """A few rounded areas in tones of the figure's color: shaded, but no subject."""
    drawing = compose(scene)
    left, top, right, bottom = bounds(figure_shapes(drawing))
    color = COLORS.get(scene.figures[0].color, (120, 160, 170))
    tones = (color, lighten(color, 0.5), darken(color, 0.3), (250, 250, 248), (30, 26, 38))
    shapes: list[Shape] = []
    for i in range(int(rng.integers(1, 6))):
        x, y = float(rng.uniform(left, right)), float(rng.uniform(top, bottom))
        rx, ry = (float(v) for v in rng.uniform(0.15, 0.5, 2) * np.array([right - left, bottom - top]))
        tone = tones[int(rng.integers(len(tones)))] if i else color
        kind = rng.random()
        if kind < 0.5:
            shapes.append(ellipse(x, y, rx, ry, tone, turn=float(rng.uniform(0, 90))))
        elif kind < 0.7:
            shapes.append(box(x - rx, y - ry, x + rx, y + ry, tone, radius=0.02))
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 6))
            shapes.append(blob([(x + rx * float(np.cos(a)), y + ry * float(np.sin(a))) for a in angles], tone))
    return draw(with_figure(drawing, shapes))


def join_halves(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """One half of the figure beside, or on top of, half of another subject."""
    figure = scene.figures[0]
    other = choose(rng, [name for name in SUBJECTS if name != figure.subject])
    poses = SUBJECTS[other].poses
    swapped = replace(figure, subject=other, pose=choose(rng, poses), prop="")
    first, second = compose(scene), compose(replace(scene, figures=(swapped,)))
    picture, strange = draw(first), draw(second)
    left, top, right, bottom = figure_box_px(first)
    corner = ((left + right) // 2, 0) if rng.random() < 0.5 else (0, (top + bottom) // 2)
    picture.paste(strange.crop((*corner, SIZE_PX, SIZE_PX)), corner)
    return picture


def fade(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """The figure is almost transparent."""
    drawing = compose(scene)
    return Image.blend(draw(without_figures(drawing)), draw(drawing), float(rng.uniform(0.05, 0.25)))


MALFORMED: dict[str, Callable[[Scene, Rng, Draw], Image.Image]] = {
    "double head": double_head,
    "parts missing": drop_parts,
    "half erased": half_erased,
    "erased": erase,
    "smeared": smear,
    "blurred": blur_all,
    "warped": warp,
    "shuffled": shuffle_tiles,
    "blobs": replace_by_blobs,
    "halves joined": join_halves,
    "faded": fade,
}
"""Ways to spoil a subject. The reader is trained on all but those of `UNSEEN`."""
UNSEEN = ("halves joined", "faded")


def is_changed(first: Image.Image, second: Image.Image) -> bool:
    """Whether two pictures differ visibly somewhere."""
    return max(high for _, high in ImageChops.difference(first, second).getextrema()) > 32
