"""How far pictures are from a style, in the features of the base's own autoencoder.

No further network is needed, so the measure works offline and for every base. It tells a base from an adapter, and
weak from strong; small differences between two adapters are within its noise.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lora_diffusion.models.load import Base


@torch.no_grad()
def style_features(base: Base, pictures: Sequence[Image.Image]) -> list[Tensor]:
    """For each level of the encoder: mean and standard deviation of every channel, averaged over the pictures.

    The channel statistics of AdaIN [arXiv:1703.06868]. Pictures of any size; each is scaled to the base's own.
    """
    encoder: nn.Module = base.pipe.vae.encoder
    levels: list[Tensor] = []
    blocks: list[nn.Module] = [
        encoder.get_submodule("conv_in"),
        *encoder.get_submodule("down_blocks").children(),
    ]
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: levels.append(channel_statistics(out))) for block in blocks
    ]
    try:
        encoder(stack_images(pictures, base.size_px).to(base.pipe.vae.device, base.pipe.vae.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return levels


def channel_statistics(features: Tensor) -> Tensor:
    """(2 * channels,): mean and standard deviation over space, averaged over (n, channels, h, w)."""
    flat = features.float().flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2)], dim=1).mean(dim=0)


def stack_images(pictures: Sequence[Image.Image], size_px: int) -> Tensor:
    """(n, 3, size, size) in -1..1."""
    arrays = [
        np.array(p.convert("RGB").resize((size_px, size_px), Image.Resampling.LANCZOS), dtype=np.float32)
        for p in pictures
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def style_distance(base: Base, pictures: Sequence[Image.Image], style: Sequence[Image.Image]) -> float:
    """Mean over the encoder's levels of the relative difference of their channel statistics; 0 is the same style."""
    pairs = zip(style_features(base, pictures), style_features(base, style), strict=True)
    return float(np.mean([float((a - b).norm() / b.norm()) for a, b in pairs]))


def list_style_images(folder: Path) -> list[Image.Image]:
    """The PNG pictures of a training set."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
