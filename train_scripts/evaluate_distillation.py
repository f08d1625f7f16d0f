"""Measure distilled adapters on the embedded base: how near they come to the blend, in predictions and in pictures.

    python -m train_scripts.evaluate_distillation

gloop 0.8 and neon 0.6 under modes that are no sum, as one adapter of the given rank. The prompts are the settings and
times of day that gloop was not trained in; a quarter of them is kept for the pictures, and distillation holds out some
of its own for the error in predictions. Writes `sample_data/distillation.json`, and a sheet of pictures beside it.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, BlendSum, WeightedAdapter
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import Composition, Mode
from lora_diffusion.core.atomic_files import atomic_file, sample_data_folder
from lora_diffusion.evaluation.image_grid import draw_image_grid, save_grid
from lora_diffusion.evaluation.style_distance import list_style_images, style_distance
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base, load_base
from lora_diffusion.training.distillation.distill import distill, make_distillation_metadata
from lora_diffusion.training.distillation.mean_delta import compress_sum, plain_sum, record_mean_sum
from train_scripts.evaluate_routing import prompts
from train_scripts.tiny_world.reader import load_reader, read

WEIGHTS = {"gloop": 0.8, "neon": 0.6}
MODES: tuple[Mode, ...] = ("switch", "composite")
SEEDS, SHOWN = 2, 4
DRAWN_SHARE = 4
"""One prompt of so many is for the pictures."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of making the pictures."""

    title: str
    blend: Blend
    composition: Composition = field(default_factory=Composition)


def both() -> Blend:
    paths = {name: sample_data_folder() / "adapters" / f"{name}.safetensors" for name in WEIGHTS}
    entries = (
        WeightedAdapter(adapter=load_adapter(paths[name]), weight=weight, path=paths[name])
        for name, weight in WEIGHTS.items()
    )
    return Blend(entries=tuple(entries))


def svd(base: Base, blend: Blend, total: BlendSum, rank: int) -> Adapter:
    return compress_sum(base, total, rank, make_distillation_metadata(base, blend, Composition()))


def alone(adapter: Adapter) -> Blend:
    return Blend(entries=(WeightedAdapter(adapter=adapter),))


def pictures_of(base: Base, way: Way, configs: Sequence[GenerateConfig]) -> list[Image.Image]:
    return [picture.image for picture in generate(base, configs, way.blend, composition=way.composition)]


def pixel_distance(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    """Root of the mean squared difference of all pixels, as a share of their range."""
    pairs = zip(first, second, strict=True)
    return float(np.mean([(np.asarray(a, float) - np.asarray(b, float)) ** 2 for a, b in pairs]) ** 0.5 / 255)


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    return {"architecture": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def measure(output: Path | None = None, rank: int = 8, steps: int = 200) -> None:
    """Distill and draw; print, and write as JSON, the errors, the seconds, and how the pictures compare."""
    output = output or sample_data_folder() / "distillation.json"
    base, blend, texts = load_base(), both(), prompts()
    drawn = texts[::DRAWN_SHARE]
    learned = [text for text in texts if text not in drawn]
    config = DistillConfig(rank=rank, steps=steps)
    configs = [GenerateConfig(prompt=text, seed=100 * s + i) for s in range(SEEDS) for i, text in enumerate(drawn)]
    facts: dict[str, Any] = {"machine": machine(), "config": config.model_dump(mode="json"), "modes": {}}
    mean = record_mean_sum(base, blend, Composition(mode="composite"), config.num_inference_steps)  # that of switch too
    ways = [
        Way(title="base", blend=Blend()),
        Way(title="SVD of the sum", blend=alone(svd(base, blend, plain_sum(base, blend), rank))),
        Way(title="SVD of the mean", blend=alone(svd(base, blend, mean, rank))),
    ]
    for mode in MODES:
        composition = Composition(mode=mode)
        result = distill(base, blend, composition, learned, config)
        facts["modes"][mode] = {**vars(result.report), "seconds": round(result.seconds, 1)}
        ways += [Way(title=mode, blend=blend, composition=composition)]
        ways += [Way(title=f"{mode}, distilled", blend=alone(result.adapter))]
    pictures = {way.title: pictures_of(base, way, configs) for way in ways}
    facts["pictures"] = {title: compared(base, title, pictures) for title in pictures}
    with atomic_file(output) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    rows = list(zip(*[found[:SHOWN] for found in pictures.values()], strict=True))
    sheet = draw_image_grid(rows, columns=list(pictures), labels=drawn[:SHOWN])
    save_grid(sheet, output.with_suffix(".png"))
    print(json.dumps(facts, indent=2))


def compared(base: Base, title: str, pictures: dict[str, list[Image.Image]]) -> dict[str, Any]:
    """How often gloop is read, how far the style is from neon's, and how far the pixels are from each mode's own."""
    readings = read(load_reader(sample_data_folder() / "tiny-world-reader"), pictures[title])
    neon = list_style_images(sample_data_folder() / "styles" / "neon")
    return {
        "gloop": sum(reading.subject == "gloop" for reading in readings),
        "of": len(readings),
        "style_distance": round(style_distance(base, pictures[title], neon), 3),
        "pixels": {mode: round(pixel_distance(pictures[title], pictures[mode]), 4) for mode in MODES},
    }


if __name__ == "__main__":
    tyro.cli(measure)
