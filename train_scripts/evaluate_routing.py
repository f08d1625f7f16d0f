"""Measure a routed preset against plain sums: is the subject read, and how far is the style.

    lora-diffusion route sample_data/configs/route-neon-gloop.toml
    python -m train_scripts.evaluate_routing runs/neon-gloop-routed.json

The prompts are the settings and times of day that gloop was not trained in, two seeds each, in neon.
"""

import itertools
from pathlib import Path

import tyro

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.evaluation.style_distance import list_style_images, style_distance
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.library.presets import read_preset
from lora_diffusion.library.references import load_blend, resolve_entry_paths
from lora_diffusion.models.load import load_base
from train_scripts.draw_sample_sets import SETTINGS, TIMES, character_scene, subject_caption, subject_scenes
from train_scripts.tiny_world.reader import load_reader, read

SUMS = ((1.0, 1.0), (0.5, 0.5), (0.6, 0.8), (0.4, 0.6))
"""Weights of neon and gloop to compare with."""
SEEDS, STEPS = 2, 12


def prompts() -> list[str]:
    """A gloop in neon, everywhere that its training set was not."""
    seen = {(scene.setting, scene.time) for scene in subject_scenes("gloop")}
    unseen = [pair for pair in itertools.product(SETTINGS, TIMES) if pair not in seen]
    return [f"{subject_caption(character_scene('gloop', *pair))}, in zwx style" for pair in unseen]


def plain_blend(neon: float, gloop: float) -> Blend:
    adapters = [load_adapter(sample_data_folder() / "adapters" / f"{name}.safetensors") for name in ("neon", "gloop")]
    pairs = zip(adapters, (neon, gloop), strict=True)
    return Blend(entries=tuple(WeightedAdapter(adapter=adapter, weight=weight) for adapter, weight in pairs))


def measure(preset: tyro.conf.Positional[Path]) -> None:
    """Print, for the preset and for plain sums, how often gloop is read and the distance to the neon training set."""
    routed = load_blend(resolve_entry_paths(read_preset(preset).adapters, preset.parent)).blend
    blends = {f"neon {n} + gloop {g}": plain_blend(n, g) for n, g in SUMS} | {preset.stem: routed}
    base, reader = load_base(), load_reader(sample_data_folder() / "tiny-world-reader")
    neon = list_style_images(sample_data_folder() / "styles" / "neon")
    texts = prompts()
    configs = [
        GenerateConfig(prompt=text, seed=100 * seed + i, num_inference_steps=STEPS)
        for seed in range(SEEDS)
        for i, text in enumerate(texts)
    ]
    for name, blend in blends.items():
        pictures = [picture.image for picture in generate(base, configs, blend)]
        found = sum(reading.subject == "gloop" for reading in read(reader, pictures))
        distance = style_distance(base, pictures, neon)
        print(f"{name:<24} gloop in {found} of {len(pictures)}, style distance {distance:.3f}", flush=True)


if __name__ == "__main__":
    tyro.cli(measure)
