"""What the autoencoder learns from: the flat world, the styles the base knows, and random lines, tiles and colors."""

import numpy as np
import torch
from PIL import Image

from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.scene import choose, random_scene
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.known_styles import KNOWN_STYLES
from train_scripts.picture_world.styles.random_styles import (
    flip,
    recolor,
    render_random_lines,
    render_random_tiles,
    render_scribble,
)

Rng = np.random.Generator


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """(3, height, width) float32 in -1..1."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


def random_picture(rng: Rng) -> Image.Image:
    kind = rng.random()
    if kind < 0.1:
        return flip(render_scribble(rng), rng)
    drawing = compose(random_scene(rng))
    if kind < 0.45:
        return render_flat(drawing)
    if kind < 0.65:
        return KNOWN_STYLES[choose(rng, KNOWN_STYLES)](drawing, rng)
    if kind < 0.82:
        return flip(render_random_lines(drawing, rng), rng)
    if kind < 0.88:
        return render_random_tiles(drawing, rng)
    return flip(recolor(render_flat(drawing), rng), rng)


def random_batch(rng: Rng, count: int) -> torch.Tensor:
    """(count, 3, 128, 128) in -1..1."""
    return torch.stack([to_tensor(random_picture(rng)) for _ in range(count)])
