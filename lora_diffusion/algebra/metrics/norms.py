"""How strong an adapter is, from its tensors alone."""

from __future__ import annotations

import math
from statistics import median

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.errors import ConfigError


def delta_norm(layer: Layer) -> float | None:
    """Frobenius norm of the delta; None for DoRA, whose delta depends on the base, and for values that are no numbers.

    For plain LoRA from the rank x rank Gram matrices of its factors.
    """
    if layer.kind == "DoRA":
        return None
    if not isinstance(layer, LoRALayer) or layer.mid is not None:
        return none_unless_finite(float(layer.delta().double().square().sum().sqrt()))
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    return none_unless_finite(abs(layer.scale) * float(squared.sqrt()))


def none_unless_finite(norm: float) -> float | None:
    return norm if math.isfinite(norm) else None


def typical_norm(adapter: Adapter) -> float:
    """The median of the norms of an adapter's deltas, over its modules; adapters differ in it a hundredfold.

    Raises ConfigError if no layer's delta can be measured, as of DoRA, or if it is 0.
    """
    norms = [norm for layer in adapter.layers.values() if (norm := delta_norm(layer)) is not None]
    typical = median(norms) if norms else 0.0
    if typical == 0:
        name = adapter.metadata.name or "the adapter"
        raise ConfigError(f"{name}: has no delta whose strength can be measured; blend it without balancing")
    return typical
