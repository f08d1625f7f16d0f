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
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    return _none_unless_finite(abs(layer.scale) * float(squared.sqrt()))


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
