"""Many adapters as one, exactly: the factors are joined and the ranks add up."""

import torch

from lora_diffusion.adapter import Adapter, AdapterMetadata, LoRALayer
from lora_diffusion.blend import Blend


def combine(blend: Blend, metadata: AdapterMetadata) -> Adapter:
    """One adapter whose delta is the blend's at every module, with scale 1 (alpha = rank).

    Weights and scales go into `up` once; averaging factors instead would add cross terms up_i @ down_j.
    """
    return Adapter(layers={path: joined_layer(blend, path) for path in blend.paths}, metadata=metadata)


def joined_layer(blend: Blend, path: str) -> LoRALayer:
    pairs = [(e.weight, e.adapter.layers[path]) for e in blend.active if path in e.adapter.layers]
    up = torch.cat([layer.up.float() * (weight * layer.scale) for weight, layer in pairs], dim=1)
    down = torch.cat([layer.down.float() for _, layer in pairs], dim=0)
    return LoRALayer(down=down, up=up, alpha=float(down.shape[0]))
