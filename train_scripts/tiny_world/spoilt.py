"""Pictures whose subject is spoilt in some way: what a reader that cannot be flattered calls `nothing`."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from train_scripts.tiny_world.characters import CHARACTERS
from train_scripts.tiny_world.render import SIZE_PX
from train_scripts.tiny_world.scene import Picture, Scene, compose, figure
from train_scripts.tiny_world.settings import LIGHTS
from train_scripts.tiny_world.shapes import Shape, box, darken, ellipse, lighten, place, tinted
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS

Rng = np.random.Generator
Draw = Callable[[Picture], Image.Image]
"""A style: from shapes to a picture, the same picture each time."""
ANIMALS = ("cat", "dog", "rabbit", "zuki")
"""Subjects of a like build, which stay themselves with the feet of another."""


def blurred(picture: Image.Image, radius_px: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius_px))


def bounds(picture: Picture) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the subject, in fractions of the side."""
    points = np.concatenate([shape.points for shape in picture.subject])
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def with_other_subject(scene: Scene, shapes: list[Shape], draw: Draw) -> Image.Image:
    """The scene with `shapes` standing where its subject stood, as tall and in the same light."""
    picture = compose(scene)
    left, top, right, bottom = bounds(picture)
    placed = place(shapes, x=(left + right) / 2, bottom=bottom, height=bottom - top, mirrored=False)
    return draw(replace(picture, subject=tuple(tinted(placed, LIGHTS[scene.time].subject))))


def missing(scene: Scene, _: Rng, draw: Draw) -> Image.Image:
    return with_other_subject(scene, [], draw)


def blob(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """One ellipse or box of the scene's colour."""
    colour, rx, ry = COLOURS[scene.colour], float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.25, 0.5))
    if rng.random() < 0.6:
        return with_other_subject(scene, [ellipse(0, 1 - ry, rx, ry, colour, turn=float(rng.uniform(-30, 30)))], draw)
    return with_other_subject(scene, [box(-rx, 1 - 2 * ry, rx, 1, colour)], draw)


def blobs(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """A few ellipses and boxes in lighter and darker tones: shaded, but still no subject."""
    colour, shapes = COLOURS[scene.colour], []
    tones = (colour, colour, lighten(colour, 0.5), darken(colour, 0.3), (250, 250, 248), (28, 26, 34))
    for i in range(int(rng.integers(2, 6))):
        (x, y), (rx, ry) = rng.uniform((-0.25, 0.3), (0.25, 0.75)), rng.uniform(0.05, 0.3, 2)
        tone = tones[int(rng.integers(len(tones)))] if i else colour
        outline = box if rng.random() < 0.3 else ellipse
        corners = (x - rx, y - ry, x + rx, y + ry) if outline is box else (x, y, rx, ry)
        shapes.append(outline(*(float(c) for c in corners), tone))
    return with_other_subject(scene, shapes, draw)


def subject_mask(scene: Scene, draw: Draw) -> Image.Image:
    """255 where the subject changes the picture, else 0."""
    change = ImageChops.difference(draw(compose(scene)), draw(replace(compose(scene), subject=())))
    return change.convert("L").point(lambda value: 255 * (value > 4))


def scrambled(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """The subject's pixels in random order."""
    array, mask = np.array(draw(compose(scene))), np.array(subject_mask(scene, draw)) > 0
    array[mask] = rng.permutation(array[mask])
    return Image.fromarray(array)


def tiles(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """The subject cut into 8 px tiles, put together in random order."""
    array = np.array(draw(compose(scene)))
    edges = (int(SIZE_PX * edge) // 8 * 8 for edge in bounds(compose(scene)))
    left, top, right, bottom = (min(SIZE_PX - 8, max(0, edge)) for edge in edges)
    places = [(y, x) for y in range(top, bottom + 8, 8) for x in range(left, right + 8, 8)]
    pieces = [array[y : y + 8, x : x + 8].copy() for y, x in places]
    for (y, x), i in zip(places, rng.permutation(len(pieces)), strict=True):
        array[y : y + 8, x : x + 8] = pieces[i]
    return Image.fromarray(array)


def smeared(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """The subject blurred away inside a sharp picture."""
    picture, mask = draw(compose(scene)), subject_mask(scene, draw)
    soft = mask.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(1))
    return Image.composite(blurred(picture, float(rng.uniform(4.5, 8))), picture, soft)


def all_smeared(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    return blurred(draw(compose(scene)), float(rng.uniform(4.5, 7)))


def halves(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """Half of one subject beside, or on top of, half of another."""
    across = bool(rng.random() < 0.5)
    alike = ANIMALS if scene.subject in ANIMALS and not across else (scene.subject,)
    other = str(rng.choice([name for name in (*SUBJECTS, *CHARACTERS) if name not in alike]))
    first, second = draw(compose(scene)), with_other_subject(scene, figure(replace(scene, subject=other)), draw)
    left, top, right, bottom = (round(SIZE_PX * edge) for edge in bounds(compose(scene)))
    corner = ((left + right) // 2, 0) if across else (0, (top + bottom) // 2)
    first.paste(second.crop((*corner, SIZE_PX, SIZE_PX)), corner)
    return first


CRUDE: dict[str, Callable[[Scene, Rng, Draw], Image.Image]] = {
    "missing": missing,
    "blob": blob,
    "blobs": blobs,
    "scrambled": scrambled,
    "tiles": tiles,
    "smeared": smeared,
    "all_smeared": all_smeared,
    "halves": halves,
}
"""Pictures without a subject, by the way it was spoilt."""
