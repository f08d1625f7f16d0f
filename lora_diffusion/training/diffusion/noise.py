"""Noise of training samples: Gaussian, with offset noise, pyramid noise and input perturbation."""

import torch
from torch import Tensor
from torch.nn import functional

from lora_diffusion.config.train import ObjectiveConfig


def draw_noise(shape: tuple[int, int, int], config: ObjectiveConfig, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the noise of one sample.

    Offset noise adds `noise_offset * N(0, 1)` to all pixels of a channel
    (crosslabs.org/blog/diffusion-with-offset-noise). It is added after the normalization of pyramid noise, so that it
    has the configured size. Input perturbation adds `input_perturbation * N(0, I)` to the input but not to the target
    [arXiv:2301.11706].

    Args:
        shape: (c, h, w) of the latents.
        config: Sizes of the kinds of noise.
        rng: Random generator.

    Returns:
        The noise of the target and the noise of the input, each (c, h, w) in float32; the same tensor if there is no
        input perturbation.
    """
    noise = torch.randn(shape, generator=rng)
    if config.pyramid_discount:
        noise = _add_pyramid_noise(noise, config.pyramid_discount, config.pyramid_levels, rng)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)
    if not config.input_perturbation:
        return noise, noise
    return noise, noise + config.input_perturbation * torch.randn(shape, generator=rng)


def _add_pyramid_noise(noise: Tensor, discount: float, levels: int, rng: torch.Generator) -> Tensor:
    """Add noise of lower resolutions to noise (c, h, w), and divide the sum by its standard deviation.

    Level i has 1 / r^i of the height and width, with r drawn from 2..4 for each level, is upsampled bilinearly and
    multiplied by discount^i. Level 0 is included, as in the source, and so doubles the variance of the full resolution.
    The last level is `levels`, or the first one with a single row or column. (Whitaker, Multi-Resolution Noise for
    Diffusion Model Training, 2023.)
    """
    channels, height, width = noise.shape
    pyramid = noise.clone()
    for level in range(levels + 1):
        shrink = (2 + 2 * float(torch.rand((), generator=rng))) ** level
        size = (max(1, int(height / shrink)), max(1, int(width / shrink)))
        coarse = torch.randn(1, channels, *size, generator=rng)
        pyramid += discount**level * functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return pyramid / pyramid.std()
