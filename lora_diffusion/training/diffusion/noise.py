"""The noise of a training sample: plain, shifted per channel, of many resolutions, and more in the input than the
target knows of."""

import torch
from torch import Tensor
from torch.nn import functional

from lora_diffusion.config.train import ObjectiveConfig


def draw_noise(shape: tuple[int, int, int], config: ObjectiveConfig, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The noise that the target knows and the noise that the input gets, each (c, h, w), float32.

    Without input perturbation both are one tensor. Offset noise adds `noise_offset * N(0, 1)` to each channel as a
    whole (crosslabs.org/blog/diffusion-with-offset-noise). Input perturbation adds `input_perturbation * N(0, I)` to
    the input alone [arXiv 2301.11706]. The offset comes after pyramid noise and keeps the size that is asked for.
    """
    noise = torch.randn(shape, generator=rng)
    if config.pyramid_discount:
        noise = with_pyramid(noise, config.pyramid_discount, config.pyramid_levels, rng)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)
    if not config.input_perturbation:
        return noise, noise
    return noise, noise + config.input_perturbation * torch.randn(shape, generator=rng)


def with_pyramid(noise: Tensor, discount: float, levels: int, rng: torch.Generator) -> Tensor:
    """Noise (c, h, w) with noise of lower resolutions on it, divided by the standard deviation of the whole.

    Level i has sides 1 / r^i of the noise's, r drawn from 2..4 for each, is enlarged bilinearly and weighs discount^i.
    Level 0 is there too, as in the source: it doubles the sharp noise's variance. The level that gets down to a single
    row or column is the last one. (Whitaker, Multi-Resolution Noise for Diffusion Model Training, 2023.)
    """
    channels, height, width = noise.shape
    total = noise.clone()
    for level in range(levels + 1):
        shrink = (2 + 2 * float(torch.rand((), generator=rng))) ** level
        low = (max(1, int(height / shrink)), max(1, int(width / shrink)))
        coarse = torch.randn(1, channels, *low, generator=rng)
        total += discount**level * functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        if 1 in low:
            break
    return total / total.std()
