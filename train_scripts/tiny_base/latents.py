"""Stage two of the embedded base: training scenes drawn once and kept as latents, with what their captions need."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.scene import Figure, Scene, choose, random_scene
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.known_styles import KNOWN_STYLES
from train_scripts.tiny_base.vae_pictures import to_tensor

STYLED_SHARE = 0.3
CHUNK = 64
StyledScene = tuple[Scene, str]


def random_styled_scene(rng: np.random.Generator) -> StyledScene:
    """A scene of the training part of the world, in three of ten cases in a style that the base learns."""
    scene = random_scene(rng)
    return scene, choose(rng, KNOWN_STYLES) if rng.random() < STYLED_SHARE else "flat"


@torch.no_grad()
def cache_latents(vae_folder: Path, target: Path, *, count: int, seed: int) -> None:
    """Draw `count` training scenes and write their latents to `target` in float16, with the scenes beside them.

    Latents are the posterior's mean, unscaled.
    """
    vae = AutoencoderKL.from_pretrained(vae_folder).to(memory_format=torch.channels_last)
    rng = np.random.default_rng((3, seed))
    scenes = [random_styled_scene(rng) for _ in range(count)]
    parts: list[Tensor] = []
    for start in range(0, count, CHUNK):
        pictures = [to_tensor(_render(scene, style, rng)) for scene, style in scenes[start : start + CHUNK]]
        batch = torch.stack(pictures).to(memory_format=torch.channels_last)
        parts.append(vae.encode(batch).latent_dist.mean.half().contiguous())
        if start % (100 * CHUNK) == 0:
            print(f"{target.name}: {start} of {count}", flush=True)
    rows = [asdict(scene) | {"style": style} for scene, style in scenes]
    torch.save({"latents": torch.cat(parts), "scenes": rows}, target)


def _render(scene: Scene, style: str, rng: np.random.Generator):
    drawing = compose(scene)
    return render_flat(drawing) if style == "flat" else KNOWN_STYLES[style](drawing, rng)


def load_latents(folder: Path) -> tuple[Tensor, list[StyledScene]]:
    """All latents in `folder`, (n, channels, h, w) in float16, and their scenes."""
    loaded: list[dict[str, Any]] = [torch.load(file) for file in sorted(folder.glob("latents*.pt"))]
    scenes = [_from_row(row) for part in loaded for row in part["scenes"]]
    return torch.cat([part["latents"] for part in loaded]), scenes


def _from_row(row: dict[str, Any]) -> StyledScene:
    style = row.pop("style")
    figures = tuple(Figure(**figure) for figure in row.pop("figures"))
    return Scene(figures=figures, **row), style
