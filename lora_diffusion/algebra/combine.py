"""Many adapters as one, exactly: the factors are joined and the ranks add up."""

from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.blend import Blend, joined_layer


def combine(blend: Blend, metadata: AdapterMetadata) -> Adapter:
    """One adapter whose delta is the blend's at every module, with scale 1 (alpha = rank)."""
    return Adapter(layers={path: joined_layer(blend, path) for path in blend.paths}, metadata=metadata)
