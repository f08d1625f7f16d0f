"""Measure the embedded base: does it draw what the prompt asks, also for combinations it never saw?

    python -m train_scripts.evaluate_tiny_base --prompts 480

Pictures are read by the reader of `sample_data/tiny-world-reader`; its accuracy on true renderings of the
same scenes, plain and through the base's autoencoder, is the ceiling. Each picture has a seed of its own, so
that the figures can be repeated.
"""

import json
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from train_scripts.tiny_world.base_card import write_card
from train_scripts.tiny_world.prompts import asked_scenes
from train_scripts.tiny_world.reader import (
    HEADS,
    Reading,
    WorldReader,
    load_reader,
    machine,
    proportion,
    read,
    scores,
    stacked,
)
from train_scripts.tiny_world.render import flat
from train_scripts.tiny_world.scene import Scene, compose, is_held_out, random_scene
from train_scripts.tiny_world.subjects import SUBJECTS
from train_scripts.tiny_world.vae_training import psnr

FRAME_COLOURS = {True: (40, 190, 80), False: (230, 50, 50)}


@dataclass(frozen=True, kw_only=True)
class Config:
    base: Path = Path("sample_data/tiny-sd")
    reader: Path = Path("sample_data/tiny-world-reader")
    prompts: int = 480
    """How many; half of them ask for held-out combinations."""
    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    batch: int = 24
    threads: int = 2
    out: Path = Path("sample_data/tiny-sd")
    """Folder for `figures.json`, the card `README.md` and `contact_sheet.png`."""


def generate(pipe: StableDiffusionPipeline, prompts: list[str], config: Config) -> list[Image.Image]:
    """One picture per prompt; picture i has the seed `config.seed * 100_000 + i`."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), config.batch):
        part = prompts[start : start + config.batch]
        seeds = [config.seed * 100_000 + start + i for i in range(len(part))]
        output = pipe(
            part,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        pictures += output.images
    return pictures


def seen_and_held_out(readings: list[Reading], scenes: list[Scene]) -> dict[str, dict]:
    """Scores over all scenes, and apart for combinations of the training pictures and held-out ones."""
    held = [is_held_out(s.subject, s.colour, s.setting) for s in scenes]
    parts = {"all": [True] * len(held), "seen": [not h for h in held], "held_out": held}
    table: dict[str, dict] = {}
    for name, chosen in parts.items():
        pairs = [(r, s) for r, s, use in zip(readings, scenes, chosen, strict=True) if use]
        table[name] = scores([r for r, _ in pairs], [s for _, s in pairs])
    return table


def per_subject(readings: list[Reading], scenes: list[Scene]) -> dict[str, dict]:
    """How often each subject is read where it was asked for."""
    pairs = [(r.subject, s.subject) for r, s in zip(readings, scenes, strict=True)]
    hits = {name: [got == name for got, asked in pairs if asked == name] for name in SUBJECTS}
    return {name: proportion(values) for name, values in hits.items() if values}


def mistakes(readings: list[Reading], scenes: list[Scene], head: str) -> list[dict[str, str | int]]:
    """The commonest confusions of one question, at most twelve."""
    pairs = [(getattr(s, head), getattr(r, head)) for r, s in zip(readings, scenes, strict=True)]
    counts = Counter(pair for pair in pairs if pair[0] != pair[1])
    return [{"asked": a, "read": b, "count": n} for (a, b), n in counts.most_common(12)]


@torch.no_grad()
def autoencoded(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """(n, 3, 64, 64) in -1..1, there and back."""
    parts = [vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pictures.split(24)]
    return torch.cat(parts).clamp(-1, 1)


def autoencoder_figures(vae: AutoencoderKL, seed: int) -> dict[str, float | int | dict[str, float]]:
    """PSNR in dB on flat held-out scenes, and on each style that the autoencoder has not seen."""
    from train_scripts.tiny_world.styles import STYLES  # only this figure needs the style renderers

    rng = np.random.default_rng((31, seed))
    pictures = [compose(random_scene(rng, held_out=True)) for _ in range(64)]
    styles = {
        name: round(psnr(vae, stacked([draw(p, rng) for p in pictures[:32]])), 2) for name, draw in STYLES.items()
    }
    flat_db = round(psnr(vae, stacked([flat(p) for p in pictures])), 2)
    return {"flat_db": flat_db, "flat_count": 64, "styles_db": styles, "style_count": 32}


def seconds_per_image(pipe: StableDiffusionPipeline, config: Config) -> dict[str, float | int]:
    """One picture alone on two threads: the median of five, after one that is not counted.

    The machine's load average just before says whether it was idle, as it has to be for the figure to hold.
    """
    load = round(os.getloadavg()[0], 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seconds: list[float] = []
    for _ in range(6):
        started = time.perf_counter()
        generate(pipe, ["a red cat on a meadow"], config)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    median = round(statistics.median(seconds[1:]), 3)
    return {"median": median, "runs": 5, "steps": config.steps, "threads": 2, "load_before": load}


def contact_sheet(pictures: list[Image.Image], right: list[bool]) -> Image.Image:
    """Up to 64 pictures in 8 columns, framed green where the subject is right and red where it is not."""
    columns, frame = 8, 3
    framed = [
        ImageOps.expand(p.resize((96, 96), Image.Resampling.NEAREST), frame, FRAME_COLOURS[ok])
        for p, ok in zip(pictures[:64], right[:64], strict=True)
    ]
    side = 96 + 2 * frame
    sheet = Image.new("RGB", (columns * side, -(-len(framed) // columns) * side))
    for i, picture in enumerate(framed):
        sheet.paste(picture, (i % columns * side, i // columns * side))
    return sheet


def ceiling(reader: WorldReader, vae: AutoencoderKL, scenes: list[Scene]) -> dict[str, dict]:
    """What the reader makes of true renderings, plain and through the autoencoder."""
    pictures = stacked([flat(compose(scene)) for scene in scenes])
    return {
        "renderings": scores(read(reader, pictures), scenes),
        "autoencoded": scores(read(reader, autoencoded(vae, pictures)), scenes),
    }


def evaluate(pipe: StableDiffusionPipeline, reader: WorldReader, config: Config) -> dict:
    """All figures as they go into the JSON file; also saves the contact sheet."""
    asked = asked_scenes(config.prompts, config.seed)
    scenes = [scene for scene, _ in asked]
    timing = seconds_per_image(pipe, config)  # first, while nothing of ours has raised the load
    started = time.perf_counter()
    pictures = generate(pipe, [prompt for _, prompt in asked], config)
    minutes = round((time.perf_counter() - started) / 60, 1)
    readings = read(reader, pictures)
    right = [r.subject == s.subject for r, s in zip(readings, scenes, strict=True)]
    contact_sheet(pictures, right).save(config.out / "contact_sheet.png", optimize=True)
    return {
        "generated": seen_and_held_out(readings, scenes),
        "subjects": per_subject(readings, scenes),
        "mistakes": {head: mistakes(readings, scenes, head) for head in HEADS},
        "ceiling": ceiling(reader, pipe.vae, scenes),
        "autoencoder": autoencoder_figures(pipe.vae, config.seed),
        "seconds_per_image": timing,
        "generating_minutes": minutes,
    }


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(config.threads)
    pipe = StableDiffusionPipeline.from_pretrained(config.base, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    settings = {k: getattr(config, k) for k in ("prompts", "steps", "guidance", "seed", "batch")}
    config.out.mkdir(parents=True, exist_ok=True)
    figures = {"settings": settings, "machine": machine(), **evaluate(pipe, load_reader(config.reader), config)}
    (config.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(config.out, figures)
    print(json.dumps({name: part["all_three"]["accuracy"] for name, part in figures["generated"].items()}))


if __name__ == "__main__":
    main()
