"""Initial noise of variations: interpolated between the noise of two seeds, as A1111's variation seeds are."""

import torch
from torch import Tensor

_PARALLEL_COSINE = 0.9995
"""Absolute cosine above which two columns count as parallel and are interpolated linearly."""


def variation_noise(
    shape: tuple[int, ...], generator: torch.Generator, variation_seed: int, strength: float, dtype: torch.dtype
) -> Tensor:
    """Draw the initial noise of a variation.

    The noise is interpolated on the sphere, column by column, as A1111 does. All noise is drawn on the CPU, so that the
    result does not depend on the device.

    Args:
        shape: Shape of the latents, (1, channels, height, width).
        generator: CPU generator of the main seed; it is advanced by one draw of this shape.
        variation_seed: Seed of the noise to interpolate to.
        strength: 0 gives the noise of the main seed, 1 exactly that of `variation_seed`.
        dtype: Type of the result.
    """
    start, end = (
        torch.randn(shape, generator=each, dtype=dtype)
        for each in (generator, torch.Generator("cpu").manual_seed(variation_seed))
    )
    return slerp_columns(start.float(), end.float(), strength).to(dtype)


def slerp_columns(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Interpolate spherically (Shoemake 1985) between the columns of two tensors (..., height, width)."""
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-2).unsqueeze(-2)
    angle = cosine.clamp(-1, 1).acos()
    arc = ((1 - fraction) * angle).sin() / angle.sin() * start + (fraction * angle).sin() / angle.sin() * end
    return torch.where(cosine.abs() > _PARALLEL_COSINE, torch.lerp(start, end, fraction), arc)
