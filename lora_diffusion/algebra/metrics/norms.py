"""Frobenius norms of deltas, computed from the adapter's tensors alone."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def frobenius_norm(tensor: Tensor) -> float:
    """Return the Frobenius norm of a tensor, accumulated in float64."""
    import torch  # slow to import, and `delta_norm` works without

    linalg: Any = torch.linalg
    return float(linalg.vector_norm(tensor, dtype=torch.float64))


def delta_norm(layer: Layer) -> float | None:
    """Return the Frobenius norm of a layer's delta.

    Plain LoRA needs no dense delta: the norm follows from the (rank x rank) Gram matrices of the two factors.

    Returns:
        The norm, or None for DoRA, whose delta depends on the base, and for deltas with NaN or infinity.
    """
    if layer.kind == "DoRA":
        return None
    if not isinstance(layer, LoRALayer) or layer.mid is not None:
        return _none_unless_finite(float(layer.delta().double().square().sum().sqrt()))
    return _none_unless_finite(float(low_rank_norm(layer.down, layer.up, layer.scale)))


def low_rank_norm(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Compute ||scale * up @ down||_F, a scalar, without forming the product.

    The square of the norm is scale^2 tr(up^T up down down^T), from two r x r Gram matrices. It is computed in float64
    where the device supports it, because the trace loses digits when up and down nearly cancel.

    Args:
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
        scale: Multiplier of the product.

    Raises:
        ValueError: If `up` has a kernel larger than 1 x 1.
    """
    if up[0, 0].numel() != 1:
        raise ValueError(f"up has shape {tuple(up.shape)}; expected (out, r) or (out, r, 1, 1)")
    a, b = down.detach().flatten(1), up.detach().flatten(1)
    a, b = (a.float(), b.float()) if a.device.type == "mps" else (a.double(), b.double())
    return abs(scale) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def _none_unless_finite(norm: float) -> float | None:
    return norm if math.isfinite(norm) else None


def median_delta_norm(adapter: Adapter) -> float:
    """Return the median Frobenius norm of an adapter's deltas over its modules, a measure of its strength.

    The strengths of real adapters differ by a factor of up to a hundred.

    Raises:
        ConfigError: If the median is 0 or no delta can be measured, as for DoRA.
    """
    norms = [norm for layer in adapter.layers.values() if (norm := delta_norm(layer)) is not None]
    norm = median(norms) if norms else 0.0
    if norm == 0:
        name = adapter.metadata.name or "the adapter"
        raise ConfigError(
            f"{name}: its strength cannot be measured, because its deltas are 0 or need the base model (DoRA); "
            "turn off weight balancing for this blend"
        )
    return norm
