"""Train the reader of the picture world.

    python -m train_scripts.tiny_judge.train_reader --steps 2500 --out sample_data/tiny-world-reader

It learns from renderings in every style, drawn as it goes, and from malformed ones, whose subject is to be read as
`malformed`.
"""

import json
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional

from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.figures.subjects import CHARACTERS, SUBJECTS
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.scene import Figure, Scene, choose, find_subject, random_pair, random_single
from train_scripts.picture_world.styles.adapter_styles import ADAPTER_STYLES
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.known_styles import KNOWN_STYLES
from train_scripts.picture_world.styles.line_art import soften
from train_scripts.tiny_base.vae_pictures import to_tensor
from train_scripts.tiny_judge.labels import expect_answers
from train_scripts.tiny_judge.malformed import MALFORMED, UNSEEN, Draw
from train_scripts.tiny_judge.reader import PictureReader, save_reader

Rng = np.random.Generator
STYLES = {**KNOWN_STYLES, **ADAPTER_STYLES}
PAIR_SHARE = 0.35
MALFORMED_SHARE = 0.22
STYLED_SHARE = 0.4
CHARACTER_SHARE = 0.16


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path = Path("sample_data/tiny-world-reader")
    steps: int = 2500
    batch: int = 48
    fresh: int = 20
    """Pictures drawn anew per step; the rest of the batch comes from the last `kept`."""
    kept: int = 12000
    lr: float = 3e-3
    threads: int = 1
    seed: int = 0


def any_figure(rng: Rng) -> Figure:
    """Any subject or character in any color and pose."""
    name = choose(rng, CHARACTERS if rng.random() < CHARACTER_SHARE else SUBJECTS)
    poses = find_subject(name).poses
    return Figure(subject=name, color=choose(rng, COLORS), pose=choose(rng, poses), mirrored=bool(rng.integers(2)))


def any_scene(rng: Rng, *, pair: bool) -> Scene:
    """A scene of any combination, held out or not."""
    if pair:
        scene = random_pair(rng, held_out=False)
        return replace(scene, figures=(any_figure(rng), any_figure(rng)))
    scene = random_single(rng, held_out=False)
    return scene if rng.random() < 0.3 else replace(scene, figures=(any_figure(rng),))


def any_style(rng: Rng) -> tuple[str, Draw]:
    """A style's name and a renderer that draws the same picture each time."""
    if rng.random() >= STYLED_SHARE:
        return "flat", render_flat
    name, seed = choose(rng, STYLES), int(rng.integers(2**31))
    return name, lambda drawing: STYLES[name](drawing, np.random.default_rng(seed))


def draw_example(rng: Rng) -> tuple[Image.Image, list[int]]:
    """A picture and its label's number for each head."""
    style, draw = any_style(rng)
    if rng.random() < MALFORMED_SHARE:
        scene = any_scene(rng, pair=False)
        kind = choose(rng, [name for name in MALFORMED if name not in UNSEEN])
        expected = expect_answers(scene, compose(scene), style, malformed=True)
        return MALFORMED[kind](scene, rng, draw), expected.numbers()
    scene = any_scene(rng, pair=bool(rng.random() < PAIR_SHARE))
    drawing = compose(scene)
    return draw(drawing), expect_answers(scene, drawing, style).numbers()


def augment(picture: Image.Image, rng: Rng) -> Tensor:
    """(3, 128, 128) in -1..1 with the slight blur, noise and drift of an autoencoder."""
    pixels = to_tensor(soften(picture, float(rng.uniform(0, 1.1))))
    gain = torch.from_numpy(rng.uniform(0.95, 1.05) * rng.uniform(0.98, 1.02, (3, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return ((pixels + 1) * gain - 1 + float(rng.uniform(0, 0.06)) * noise).clamp(-1, 1)


def train(config: Config) -> PictureReader:
    """AdamW under one cycle of the learning rate; progress as JSON lines."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng((23, config.seed))
    reader = PictureReader().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    pool: deque[tuple[Image.Image, list[int]]] = deque((draw_example(rng) for _ in range(96)), maxlen=config.kept)
    started, losses = time.time(), []
    for step in range(config.steps):
        pool.extend(draw_example(rng) for _ in range(config.fresh))
        newest = range(len(pool) - config.fresh, len(pool))
        chosen = [*newest, *rng.integers(0, len(pool), config.batch - config.fresh)]
        pictures = torch.stack([augment(pool[i][0], rng) for i in chosen])
        labels = torch.tensor([pool[i][1] for i in chosen])
        logits = reader(pictures.to(memory_format=torch.channels_last))
        loss = sum(
            functional.cross_entropy(values, labels[:, k], label_smoothing=0.02)
            for k, values in enumerate(logits.values())
            if (labels[:, k] >= 0).any()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            minutes = round((time.time() - started) / 60, 2)
            row = {"step": step + 1, "loss": round(float(np.mean(losses[-50:])), 4), "minutes": minutes}
            print(json.dumps(row), flush=True)
        if (step + 1) % 500 == 0:
            save_reader(reader, config.out)
            reader.train()
    return reader.eval()


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(config.threads)
    save_reader(train(config), config.out)


if __name__ == "__main__":
    main()
