"""A small plot of an adapter's effective weight: per block and over the denoising steps."""

import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lora_diffusion.adapters.coefficients import DenoisingStep, block_factors, schedule_factor
from lora_diffusion.architectures.blocks import vector_block_names
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.preset import BlendWeight, Schedule, Weight

BLOCK_COLOR, STEP_COLOR, AXIS_COLOR = "#7c3aed", "#c05621", "#a0aec0"
NUM_STEPS = 60
"""Denoising steps at which a schedule is sampled."""


def plot_weight(weight: Weight, layout: ModelLayout) -> Image.Image:
    """Plot a weight as bars per block and as a curve over the steps.

    Raises:
        ConfigError: If the base model does not have one of the blocks.
    """
    blend_weight = weight if isinstance(weight, BlendWeight) else BlendWeight(value=weight)
    names, _ = vector_block_names(layout)
    factors = block_factors(blend_weight.blocks, layout) if blend_weight.blocks else {}
    by_block = [blend_weight.value * _mean_factor(factors.get(name, 1.0)) for name in names]
    steps = [DenoisingStep(index=i, total=NUM_STEPS) for i in range(NUM_STEPS)]
    schedule = blend_weight.schedule
    by_step = [blend_weight.value * (schedule_factor(schedule, step) if schedule else 1.0) for step in steps]
    figure = Figure(figsize=(6.4, 1.7), layout="constrained")
    block_axes, step_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    block_axes.bar(range(len(names)), by_block, color=BLOCK_COLOR, width=0.8)
    block_axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    block_axes.set_title("Weight by block", fontsize=8)
    step_axes.plot(np.linspace(0, 1, NUM_STEPS), by_step, color=STEP_COLOR, linewidth=1.6)
    step_axes.set_title("Weight over the steps", fontsize=8)
    limits = min(0, *by_block, *by_step) * 1.1, max(0.1, *by_block, *by_step) * 1.1
    for axes in (block_axes, step_axes):
        axes.tick_params(labelsize=6)
        axes.axhline(0, color=AXIS_COLOR, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(*limits)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)  # pyright: ignore[reportUnknownMemberType] (matplotlib types)
    return Image.open(stream)


def _mean_factor(factor: float | Schedule) -> float:
    """Return a block's factor, averaged over the steps if it has a schedule."""
    if not isinstance(factor, Schedule):
        return factor
    return sum(schedule_factor(factor, DenoisingStep(index=i, total=NUM_STEPS)) for i in range(NUM_STEPS)) / NUM_STEPS
