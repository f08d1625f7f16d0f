"""Many adapters as one, exactly: the factors are joined and the ranks add up."""

from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.anatomy import Anatomy
from lora_diffusion.blend import Blend, blend_sum, joined_layer


def combine(blend: Blend, metadata: AdapterMetadata, anatomy: Anatomy | None = None) -> Adapter:
    """One adapter whose delta is the blend's at every module, with scale 1 (alpha = rank).

    `anatomy` is needed for weights by block. Raises ConfigError for layers other than plain LoRA, whose factors cannot
    be stacked.
    """
    layers = {path: joined_layer(terms) for path, terms in blend_sum(blend, anatomy).layers.items()}
    return Adapter(layers=layers, metadata=metadata)
