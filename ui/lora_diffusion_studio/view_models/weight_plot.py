"""How an adapter acts, as a small picture: its factor in each block, and over the steps."""

import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lora_diffusion.adapters.coefficients import DenoisingStep, block_factors, schedule_factor
from lora_diffusion.architectures.blocks import vector_block_names
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.preset import BlendWeight, Schedule, Weight

BLUE, ORANGE, GREY = "#7c3aed", "#c05621", "#a0aec0"
STEPS = 60


def draw_effect(weight: Weight, layout: ModelLayout) -> Image.Image:
    """Draw bars for the blocks and a curve over the steps, both times the weight. Raises ConfigError."""
    whole = weight if isinstance(weight, BlendWeight) else BlendWeight(value=weight)
    every, _ = vector_block_names(layout)
    factors = block_factors(whole.blocks, layout) if whole.blocks else {}
    figure = Figure(figsize=(6.4, 1.7), layout="constrained")
    blocks, steps = figure.subplots(1, 2, width_ratios=(3, 2))
    heights = [whole.value * mean_factor(factors.get(name, 1.0)) for name in every]
    blocks.bar(range(len(every)), heights, color=BLUE, width=0.8)
    blocks.set_xticks(range(len(every)), every, rotation=90, fontsize=6)
    blocks.set_title("by block", fontsize=8)
    x = [DenoisingStep(index=i, total=STEPS) for i in range(STEPS)]
    y = [
        whole.value * (schedule_factor(whole.schedule, denoising_step) if whole.schedule else 1.0)
        for denoising_step in x
    ]
    steps.plot(np.linspace(0, 1, STEPS), y, color=ORANGE, linewidth=1.6)
    steps.set_title("over the steps", fontsize=8)
    for axes in (blocks, steps):
        axes.tick_params(labelsize=6)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(min(0, *heights, *y) * 1.1, max(0.1, *heights, *y) * 1.1)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return Image.open(stream)


def mean_factor(factor: float | Schedule) -> float:
    """Return a block's factor; its mean if it changes over the steps."""
    if not isinstance(factor, Schedule):
        return factor
    return sum(schedule_factor(factor, DenoisingStep(index=i, total=STEPS)) for i in range(STEPS)) / STEPS
