"""Directions of a T-LoRA that act at a denoising step [arXiv:2507.05964]."""

import math
from weakref import WeakKeyDictionary

from lora_diffusion.adapters.layers import Layer, LoRALayer


def truncate_at_step(layer: Layer, least: int, share: float) -> Layer:
    """The directions of a layer that act after a share of the steps; the same object for the same rank."""
    if not isinstance(layer, LoRALayer):
        return layer
    return truncate_layer(layer, rank_at_step(share, least, layer.rank))


def rank_at_step(share: float, least: int, rank: int) -> int:
    """How many directions of a T-LoRA act after a share of the way from noise to picture [arXiv:2507.05964]."""
    least = min(least, rank)
    return least + math.floor(share * (rank - least) + 1e-6)


CUTS: WeakKeyDictionary[LoRALayer, dict[int, LoRALayer]] = WeakKeyDictionary()
"""Layers that were cut, by rank, so that the same cut is the same object; they go when the layer goes."""


def truncate_layer(layer: LoRALayer, rank: int) -> LoRALayer:
    """A layer cut to its first directions, whose strength stays as it is."""
    if rank >= layer.rank:
        return layer
    known = CUTS.setdefault(layer, {})
    if rank not in known:
        up = layer.up[:, :rank].contiguous()
        known[rank] = LoRALayer(down=layer.down[:rank], up=up, alpha=layer.scale * rank)
    return known[rank]
