"""Equal weights mean equal strength."""

from __future__ import annotations

import math
from dataclasses import replace

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.algebra.metrics.norms import typical_norm
from lora_diffusion.config.preset import BlendWeight, Weight


def balance_weights(blend: Blend) -> Blend:
    """The blend with each weight scaled so that all that are on are, at weight 1, as strong as their geometric mean.

    An adapter's strength is the median norm of its deltas. Raises ConfigError for one that cannot be measured.
    """
    norms = [typical_norm(entry.adapter) for entry in blend.active]
    mean = math.exp(math.fsum(map(math.log, norms)) / len(norms)) if norms else 1.0
    pairs = zip(blend.active, norms, strict=True)
    return Blend(entries=tuple(replace(entry, weight=scale_weight(entry.weight, mean / norm)) for entry, norm in pairs))


def scale_weight(weight: Weight, factor: float) -> Weight:
    """The weight times a number, everywhere."""
    if not isinstance(weight, BlendWeight):
        return weight * factor
    components = {component: value * factor for component, value in weight.components.items()}
    return weight.model_copy(update={"value": weight.value * factor, "components": components})
