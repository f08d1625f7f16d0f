"""Many adapters as one, exactly: the factors are joined and the ranks add up."""

import torch

from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.anatomy import Anatomy
from lora_diffusion.blend import Blend, blend_sum, blended_bias, joined_layer
from lora_diffusion.errors import ConfigError


def combine(blend: Blend, metadata: AdapterMetadata, anatomy: Anatomy | None = None) -> Adapter:
    """One adapter whose delta is the blend's at every module, with scale 1 (alpha = rank).

    `anatomy` is needed for weights by block. Raises ConfigError for layers other than plain LoRA, whose factors cannot
    be stacked, and for learned words.
    """
    total = blend_sum(blend, anatomy)
    words = [word for entry in blend.active for word in entry.adapter.tokens]
    if words:
        raise ConfigError(f"the learned words {', '.join(words)} cannot be combined; convert --without-tokens first")
    return Adapter(
        layers={path: joined_layer(terms) for path, terms in total.layers.items()},
        biases={path: blended_bias(torch.zeros_like(terms[0][1]), terms) for path, terms in total.biases.items()},
        metadata=metadata,
    )
