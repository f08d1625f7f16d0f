"""Measure the embedded base: what it draws, how varied and how well, against true renderings.

    python -m train_scripts.tiny_judge.evaluate_base

Every picture has a seed of its own, so that the figures do not depend on the batch size. The reader's answers to true
renderings of the same prompts, plain and through the base's autoencoder, are the ceiling.
"""

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from train_scripts.picture_world.captions import plain_caption
from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.scene import random_scene
from train_scripts.picture_world.styles.adapter_styles import ADAPTER_STYLES
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.known_styles import KNOWN_STYLES
from train_scripts.tiny_base.vae_training import psnr
from train_scripts.tiny_judge.prompts import Question, ask_questions, vary_scene
from train_scripts.tiny_judge.reader import PictureReader, load_reader, read_pictures, stack_pictures
from train_scripts.tiny_judge.scoring import score_questions
from train_scripts.tiny_judge.statistics import describe_machine, share_of
from train_scripts.tiny_judge.style_measure import embed_pictures, frechet_distance, pairwise_distance


@dataclass(frozen=True, kw_only=True)
class Config:
    base: Path = Path("sample_data/tiny-sd")
    reader: Path = Path("sample_data/tiny-world-reader")
    out: Path = Path("sample_data/tiny-sd/figures.json")
    singles: int = 480
    pairs: int = 180
    sides: int = 90
    steps: int = 20
    guidance: float = 4.0
    batch: int = 8
    threads: int = 2
    seed: int = 0


def generate(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], config: Config, *, first_seed: int
) -> list[Image.Image]:
    """One picture per prompt, its seed counted from `first_seed`."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), config.batch):
        chunk = list(prompts[start : start + config.batch])
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(chunk))]
        output = pipe(chunk, num_inference_steps=config.steps, guidance_scale=config.guidance, generator=generators)
        pictures += output.images
    return pictures


def render_questions(questions: Sequence[Question], seed: int) -> list[Image.Image]:
    """A true rendering of each prompt."""
    rng = np.random.default_rng((43, seed))
    return [render_flat(compose(vary_scene(q.scene, rng, keep_side=q.group == "side"))) for q in questions]


@torch.no_grad()
def autoencode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """(n, 3, 128, 128) in -1..1, encoded and decoded."""
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pictures.split(16)]
    return torch.cat(parts).clamp(-1, 1)


def measure_autoencoder(vae: AutoencoderKL, seed: int) -> dict[str, float]:
    """PSNR in dB on 64 held-out flat scenes, and on 32 of them in each style."""
    rng = np.random.default_rng((31, seed))
    drawings = [compose(random_scene(rng, held_out=True)) for _ in range(64)]
    figures = {"flat": psnr(vae, stack_pictures([render_flat(d) for d in drawings]))}
    for name, render in {**ADAPTER_STYLES, **KNOWN_STYLES}.items():
        figures[name] = psnr(vae, stack_pictures([render(d, rng) for d in drawings[:32]]))
    return {name: round(value, 2) for name, value in figures.items()}


def measure_diversity(pipe: StableDiffusionPipeline, reader: PictureReader, config: Config) -> dict[str, float]:
    """Mean pairwise feature distance over eight seeds of one prompt, generated and true, over twelve prompts."""
    rng = np.random.default_rng((47, config.seed))
    questions = [q for q in ask_questions(config.seed + 1, singles=24, pairs=0, sides=0) if q.group == "single, seen"]
    generated, true = [], []
    for k, question in enumerate(questions):
        pictures = generate(pipe, [question.prompt] * 8, config, first_seed=50_000 + 8 * k)
        rendered = [render_flat(compose(vary_scene(question.scene, rng))) for _ in range(8)]
        generated.append(pairwise_distance(embed_pictures(reader, pictures)))
        true.append(pairwise_distance(embed_pictures(reader, rendered)))
    ratio = float(np.mean(generated) / np.mean(true))
    return {"generated": float(np.mean(generated)), "true": float(np.mean(true)), "ratio": round(ratio, 3)}


def measure_frechet(
    reader: PictureReader, generated: Sequence[Image.Image], true: Sequence[Image.Image], seed: int
) -> dict:
    """Fréchet distance of generated pictures to true renderings, beside that of other true renderings."""
    rng = np.random.default_rng((53, seed))
    other = [render_flat(compose(random_scene(rng, held_out=bool(i % 2)))) for i in range(len(true))]
    reference = embed_pictures(reader, true)
    return {
        "generated": round(frechet_distance(embed_pictures(reader, generated), reference), 3),
        "true": round(frechet_distance(embed_pictures(reader, other), reference), 3),
        "count": len(generated),
    }


def measure_known_styles(pipe: StableDiffusionPipeline, reader: PictureReader, config: Config) -> dict[str, dict]:
    """How often a style that the base knows by name is read off twelve pictures that ask for it."""
    rng = np.random.default_rng((59, config.seed))
    table: dict[str, dict] = {}
    for k, style in enumerate(KNOWN_STYLES):
        prompts = [plain_caption(random_scene(rng), style=style) for _ in range(12)]
        readings = read_pictures(reader, generate(pipe, prompts, config, first_seed=70_000 + 12 * k))
        table[style] = share_of([r.answers["style"] == style for r in readings])
    return table


def time_one_picture(pipe: StableDiffusionPipeline, config: Config) -> dict[str, float | int]:
    """One picture alone on two threads: the median of five, after one that is not counted.

    The machine's load average just before says whether it was idle, as it has to be for the figure to hold.
    """
    load, threads = round(os.getloadavg()[0], 2), torch.get_num_threads()
    torch.set_num_threads(2)
    seconds: list[float] = []
    for _ in range(6):
        started = time.perf_counter()
        generate(pipe, ["a red cat on a meadow"], config, first_seed=0)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    median = round(statistics.median(seconds[1:]), 3)
    return {"median": median, "runs": 5, "steps": config.steps, "threads": 2, "load_before": load}


def evaluate(pipe: StableDiffusionPipeline, reader: PictureReader, config: Config) -> dict:
    """All figures as they go into the JSON file."""
    timing = time_one_picture(pipe, config)  # first, while nothing of ours has raised the load
    questions = ask_questions(config.seed, singles=config.singles, pairs=config.pairs, sides=config.sides)
    started = time.perf_counter()
    pictures = generate(pipe, [q.prompt for q in questions], config, first_seed=0)
    minutes = round((time.perf_counter() - started) / 60, 1)
    true = render_questions(questions, config.seed)
    passed = autoencode(pipe.vae, stack_pictures(true))
    return {
        "generated": score_questions(read_pictures(reader, pictures), questions),
        "ceiling": {
            "renderings": score_questions(read_pictures(reader, true), questions),
            "autoencoded": score_questions(read_pictures(reader, passed), questions),
        },
        "known_styles": measure_known_styles(pipe, reader, config),
        "diversity": measure_diversity(pipe, reader, config),
        "frechet": measure_frechet(reader, pictures, true, config.seed),
        "autoencoder_db": measure_autoencoder(pipe.vae, config.seed),
        "seconds_per_picture": timing,
        "generating_minutes": minutes,
    }


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(config.threads)
    pipe = StableDiffusionPipeline.from_pretrained(config.base, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    settings = {k: v for k, v in asdict(config).items() if not isinstance(v, Path)}
    figures = {
        "settings": settings,
        "machine": describe_machine(),
        **evaluate(pipe, load_reader(config.reader), config),
    }
    config.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({group: rows["all"]["share"] for group, rows in figures["generated"].items()}))


if __name__ == "__main__":
    main()
