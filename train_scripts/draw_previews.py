"""Draws a picture beside each ready adapter and each ready preset, as cards show them.

    python -m train_scripts.draw_previews

To be run where the repository lies.
Each PNG carries its recipe, so that it restores its own settings where it is dropped.
"""

import os
from pathlib import Path

import tyro

from lora_diffusion.config.generate import GenerateConfig, LoadConfig
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import load_base
from lora_diffusion.workflows.images.generate import load_and_resolve_blend
from lora_diffusion.workflows.images.request import GenerationRequest, request_from_preset

PROMPTS = {
    "gloop": "a gloop character in the mountains",
    "zuki": "a zuki character on the beach",
    "ink": "a white boat on the beach, in sks style",
    "neon": "a red house in the city at night, in zwx style",
    "watercolour": "a red house in a forest, in ohwx style",
}


def draw(plan: GenerationRequest, path: Path) -> None:
    """The first picture of a plan."""
    root = sample_data_folder().parent  # recipes shall not tell where this repository lay
    entries = [e.model_copy(update={"path": os.path.relpath(Path(e.path).resolve(), root)}) for e in plan.entries]
    found = load_and_resolve_blend(plan.base, tuple(entries), LoadConfig())
    pictures = generate(load_base(plan.base), [plan.settings], found.blend, composition=plan.composition)
    pictures[0].save(path)
    print(path)


def main(seed: int = 4) -> None:
    """All of them.

    Args:
        seed: Of the adapters' pictures; presets have their own.
    """
    for name, prompt in PROMPTS.items():
        file = sample_data_folder() / "adapters" / f"{name}.safetensors"
        settings = GenerateConfig(prompt=prompt, seed=seed)
        draw(
            GenerationRequest(base="tiny-sd", entries=(BlendEntry(path=str(file)),), settings=settings),
            file.with_suffix(".png"),
        )
    for file in sorted((sample_data_folder() / "presets").glob("*.json")):
        plan = request_from_preset(file, base="", settings={}, composition={}, adapters=())
        draw(plan, file.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
