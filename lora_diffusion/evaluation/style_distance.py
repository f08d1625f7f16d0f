"""Measure the distance of images from a style, in the features of the base's own VAE encoder.

No other network is needed, so the measure works offline and for every base. It can tell an adapter from the plain base
and a low weight from a high one; small differences between two adapters are within its noise.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lora_diffusion.algebra.metrics.norms import frobenius_norm
from lora_diffusion.models.load import Base


@torch.no_grad()
def style_features(base: Base, pictures: Sequence[Image.Image]) -> list[Tensor]:
    """Compute the mean and standard deviation of every channel in each level of the VAE encoder.

    These are the channel statistics of AdaIN [arXiv:1703.06868], averaged over the images.

    Args:
        base: The base whose VAE is used.
        pictures: Images of any size, which are scaled to the base's default size.

    Returns:
        A tensor (2 * channels,) for each level.
    """
    encoder = base.vae.encoder
    levels: list[Tensor] = []
    blocks: list[nn.Module] = [
        encoder.get_submodule("conv_in"),
        *encoder.get_submodule("down_blocks").children(),
    ]
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: levels.append(_channel_statistics(out))) for block in blocks
    ]
    try:
        encoder(_stack_images(pictures, base.size_px).to(base.vae.device, base.vae.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return levels


def _channel_statistics(features: Tensor) -> Tensor:
    """Reduce features (n, channels, h, w) to spatial means and standard deviations (2 * channels,), averaged over n."""
    flat = features.float().flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2)], dim=1).mean(dim=0)


def _stack_images(pictures: Sequence[Image.Image], size_px: int) -> Tensor:
    """Scale images to squares and stack them to a tensor (n, 3, size, size) in [-1, 1]."""
    arrays = [
        np.array(p.convert("RGB").resize((size_px, size_px), Image.Resampling.LANCZOS), dtype=np.float32)
        for p in pictures
    ]
    return torch.as_tensor(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def style_distance(base: Base, pictures: Sequence[Image.Image], style: Sequence[Image.Image]) -> float:
    """Measure how far images are from a style.

    Args:
        base: The base whose VAE is used.
        pictures: The images to measure.
        style: Images in the style, such as the training set.

    Returns:
        The relative difference ||a - b|| / ||b|| of the channel statistics, averaged over the encoder's levels; 0 means
        the same statistics.
    """
    pairs = zip(style_features(base, pictures), style_features(base, style), strict=True)
    return float(np.mean([frobenius_norm(a - b) / frobenius_norm(b) for a, b in pairs]))


def list_style_images(folder: str | os.PathLike[str]) -> list[Image.Image]:
    """Read all PNG images in a folder as RGB, sorted by name."""
    return [Image.open(path).convert("RGB") for path in sorted(Path(folder).glob("*.png"))]
