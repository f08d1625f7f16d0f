"""Draw the picture of the README that shows how adapters come together: one row a prompt, one column a way.

python -m train_scripts.draw_blend_grid [--output sample_data/blends.png]
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendWeight, Composition, Region, Schedule, Weight
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.evaluation.image_grid import draw_image_grid, save_grid
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import load_base

ADAPTERS = sample_data_folder() / "adapters"
PROMPTS = (
    ("a gloop character on the beach", 1),
    ("a gloop character in the forest at night", 4),
    ("a blue house in the snow", 2),
)
LEFT, RIGHT = Region(box=(0, 0, 0.5, 1)), Region(box=(0.5, 0, 1, 1))
LATE = BlendWeight(value=0.6, schedule=Schedule(points=((0.0, 0.0), (0.3, 1.0))))


@dataclass(frozen=True, kw_only=True)
class Way:
    """One column: a title, what is blended, and how."""

    title: str
    blend: Blend
    composition: Composition = field(default_factory=Composition)


def entry(name: str, weight: Weight = 1.0, region: Region | None = None) -> WeightedAdapter:
    path = ADAPTERS / f"{name}.safetensors"
    return WeightedAdapter(adapter=load_adapter(path), weight=weight, path=path, region=region)


def ways() -> list[Way]:
    """The columns."""
    both = Blend(entries=(entry("gloop", 0.8), entry("neon", 0.6)))
    halves = Blend(entries=(entry("neon", 1.0, LEFT), entry("watercolour", 1.0, RIGHT)))
    modes = ("composite", "k-lora", "np-lora")
    return [
        Way(title="base", blend=Blend()),
        Way(title="sum", blend=both),
        Way(title="neon from 0.3", blend=Blend(entries=(entry("gloop", 0.8), entry("neon", LATE)))),
        Way(title="switch", blend=both, composition=Composition(mode="switch", switch_every=1)),
        *(Way(title=mode, blend=both, composition=Composition(mode=mode)) for mode in modes),
        Way(title="left and right", blend=halves),
    ]


def draw(output: Path | None = None) -> None:
    """Make all pictures and write them as one labeled sheet; by default where the README shows it."""
    base = load_base()
    configs = [GenerateConfig(prompt=f"{prompt}, in zwx style", seed=seed) for prompt, seed in PROMPTS]
    columns = [
        [picture.image for picture in generate(base, configs, way.blend, composition=way.composition)] for way in ways()
    ]
    sheet = draw_image_grid(
        list(zip(*columns, strict=True)),
        columns=[way.title for way in ways()],
        labels=[config.prompt for config in configs],
    )
    save_grid(sheet, output or sample_data_folder() / "blends.png")


if __name__ == "__main__":
    tyro.cli(draw)
