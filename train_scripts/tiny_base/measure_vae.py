"""Measure how exactly the autoencoder reproduces held-out scenes in each style: PSNR in dB, mean over pictures.

python -m train_scripts.tiny_base.measure_vae --vae FOLDER --out train_scripts/tiny_base/vae.json
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL

from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.scene import random_scene
from train_scripts.picture_world.styles.adapter_styles import ADAPTER_STYLES
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.known_styles import KNOWN_STYLES
from train_scripts.tiny_base.vae_pictures import to_tensor
from train_scripts.tiny_base.vae_training import psnr
from train_scripts.tiny_judge.statistics import describe_machine

STYLES: Mapping[str, Callable[..., Any]] = {
    "flat": lambda drawing, _rng: render_flat(drawing),
    **KNOWN_STYLES,
    **ADAPTER_STYLES,
}


def measure(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """Return the PSNR of each style over `count` held-out scenes, the same ones for all styles."""
    scenes = [random_scene(np.random.default_rng((99, i)), held_out=True) for i in range(count)]
    found: dict[str, float] = {}
    for name, render in STYLES.items():
        rng = np.random.default_rng(99)
        pictures = torch.stack([to_tensor(render(compose(scene), rng)) for scene in scenes])
        found[name] = round(psnr(vae, pictures), 2)
        print(f"{name:<12}{found[name]:>7.2f} dB", flush=True)
    return found


@dataclass(frozen=True, kw_only=True)
class MeasureVae:
    """Measure the autoencoder in `vae`."""

    vae: Path
    out: Path
    count: int = 60

    def run(self) -> None:
        vae = AutoencoderKL.from_pretrained(self.vae)
        figures = {"machine": describe_machine(), "pictures": self.count, "psnr_db": measure(vae, self.count)}
        self.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(MeasureVae, description=__doc__).run()
