"""Rescale the weights of a blend so that equal weights mean equal strength."""

from __future__ import annotations

import math
from dataclasses import replace

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.algebra.metrics.norms import median_delta_norm
from lora_diffusion.config.preset import BlendWeight, Weight


def balance_weights(blend: Blend) -> Blend:
    """Scale each weight so that all active adapters have the same strength at weight 1.

    The strength of an adapter is the median Frobenius norm of its deltas. The common strength is the geometric mean
    over the active adapters.

    Raises:
        ConfigError: If the strength of an active adapter cannot be measured or is 0.
    """
    norms = [median_delta_norm(entry.adapter) for entry in blend.active]
    mean = math.exp(math.fsum(map(math.log, norms)) / len(norms)) if norms else 1.0
    pairs = zip(blend.active, norms, strict=True)
    return Blend(
        entries=tuple(replace(entry, weight=_scale_weight(entry.weight, mean / norm)) for entry, norm in pairs)
    )


def _scale_weight(weight: Weight, factor: float) -> Weight:
    if not isinstance(weight, BlendWeight):
        return weight * factor
    components = {component: value * factor for component, value in weight.components.items()}
    return weight.model_copy(update={"value": weight.value * factor, "components": components})
