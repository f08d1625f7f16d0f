"""The noise that a picture starts from: that of its seed, or on the way from there to that of a second seed."""

import torch
from torch import Tensor

PARALLEL = 0.9995
"""Cosine from which two directions are one, and a straight line between them does."""


def variation_noise(
    shape: tuple[int, ...], generator: torch.Generator, other_seed: int, share: float, dtype: torch.dtype
) -> Tensor:
    """Noise (1, c, h, w) so far from the generator's own to that of another seed; `share` 1 is the other's exactly.

    Both come from the CPU, as `sample` draws them, and the generator goes on from there. Interpolated on the sphere
    column by column, as A1111 does for its variation seeds.
    """
    own, other = (
        torch.randn(shape, generator=each, dtype=dtype)
        for each in (generator, torch.Generator("cpu").manual_seed(other_seed))
    )
    return slerp_columns(own.float(), other.float(), share).to(dtype)


def slerp_columns(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Between two tensors (..., h, w) along the arc that each pair of columns spans (Shoemake 1985)."""
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-2).unsqueeze(-2)
    angle = cosine.clamp(-1, 1).acos()
    arc = ((1 - share) * angle).sin() / angle.sin() * start + (share * angle).sin() / angle.sin() * end
    return torch.where(cosine.abs() > PARALLEL, torch.lerp(start, end, share), arc)
