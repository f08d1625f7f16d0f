"""What the autoencoder learns from: the flat world, its recoloured variants, and generic line art.

The style sets of the sample data are not among them. Line art here is random strokes and outlines, so that the
autoencoder learns to carry lines as such, whatever style an adapter later brings.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw

from train_scripts.tiny_world.render import OVERSAMPLING, SIZE_PX, draw_shape, flat
from train_scripts.tiny_world.scene import compose, random_scene
from train_scripts.tiny_world.shapes import curve, ellipse, polygon, stroke

Rng = np.random.Generator


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """(3, height, width) float32 in -1..1."""
    array = torch.from_numpy(np.array(picture, dtype=np.float32))
    return array.permute(2, 0, 1) / 127.5 - 1


def colour_near(rng: Rng, level: float, spread: float) -> tuple[int, int, int]:
    r, g, b = np.clip(rng.normal(level, spread, 3), 0, 255).astype(int)
    return int(r), int(g), int(b)


def scribble(rng: Rng) -> Image.Image:
    """Random curves, outlines, dots and a few fills on light, dark or coloured ground."""
    side = SIZE_PX * OVERSAMPLING
    light = rng.random() < 0.55
    canvas = Image.new("RGB", (side, side), colour_near(rng, 225 if light else 35, 35))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(6, 22))):
        ink = colour_near(rng, 60 if light else 190, 60)
        width = float(rng.choice([0.015, 0.02, 0.03, 0.045]))
        x, y = rng.uniform(0, 1, 2)
        reach = rng.uniform(0.08, 0.4)
        points = [(float(x + dx), float(y + dy)) for dx, dy in rng.uniform(-reach, reach, (int(rng.integers(3, 7)), 2))]
        kind = rng.random()
        if kind < 0.35:
            shape = curve(points, width, ink)
        elif kind < 0.55:
            shape = stroke([*points, points[0]], width, ink)
        elif kind < 0.8:
            rx, ry = rng.uniform(0.02, reach, 2)
            ring = ellipse(float(x), float(y), float(rx), float(ry), ink).points
            shape = stroke([(float(a), float(b)) for a, b in [*ring, ring[0]]], width, ink)
        else:
            shape = polygon(points, colour_near(rng, 128, 80))
        draw_shape(draw, shape, side)
    return canvas.reduce(OVERSAMPLING)


def recoloured(picture: Image.Image, rng: Rng) -> Image.Image:
    """Channels permuted, contrast changed, sometimes inverted or coarsened to blocks."""
    array = np.array(picture, dtype=np.float32)[..., rng.permutation(3)]
    if rng.random() < 0.4:
        array = 255 - array
    if rng.random() < 0.3:
        array = np.repeat(array.mean(axis=2, keepdims=True), 3, axis=2)
    array = np.clip((array - 128) * rng.uniform(0.5, 1.3) + 128 + rng.uniform(-40, 40), 0, 255)
    result = Image.fromarray(array.astype(np.uint8))
    if rng.random() < 0.25:
        block = int(rng.choice([2, 3, 4]))
        small = result.resize((SIZE_PX // block, SIZE_PX // block), Image.Resampling.BOX)
        result = small.resize((SIZE_PX, SIZE_PX), Image.Resampling.NEAREST)
    return result


def vae_picture(rng: Rng) -> torch.Tensor:
    kind = rng.random()
    if kind < 0.25:
        return to_tensor(scribble(rng))
    picture = flat(compose(random_scene(rng, held_out=False)))
    return to_tensor(recoloured(picture, rng) if kind < 0.45 else picture)


def vae_batch(rng: Rng, count: int) -> torch.Tensor:
    """(count, 3, 64, 64) in -1..1."""
    return torch.stack([vae_picture(rng) for _ in range(count)])
