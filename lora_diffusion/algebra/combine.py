"""Many adapters as one, exactly: the factors are joined and the ranks add up."""

from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.blend import Blend, joined_layer, weighted_layers


def combine(blend: Blend, metadata: AdapterMetadata) -> Adapter:
    """One adapter whose delta is the blend's at every module, with scale 1 (alpha = rank).

    Raises ConfigError for layers other than plain LoRA, whose factors cannot be stacked.
    """
    layers = {path: joined_layer(weighted_layers(blend, path)) for path in blend.paths}
    return Adapter(layers=layers, metadata=metadata)
