"""Truncate the layers of a T-LoRA to the rank that acts at a denoising step [arXiv:2507.05964]."""

import math

from lora_diffusion.adapters.layers import Layer, LoRALayer


def truncate_at_step(layer: Layer, min_rank: int, progress: float) -> Layer:
    """Truncate a T-LoRA layer to the rank that acts at a point of the denoising run.

    Args:
        layer: Layer of any kind; only LoRA layers are truncated.
        min_rank: Rank that acts in pure noise (`AdapterMetadata.min_rank`).
        progress: Completed share of the denoising steps, 0 to 1.

    Returns:
        The truncated layer; the same object whenever the same rank is asked for.
    """
    if not isinstance(layer, LoRALayer):
        return layer
    return truncate_layer(layer, rank_at_step(progress, min_rank, layer.rank))


def rank_at_step(progress: float, min_rank: int, rank: int) -> int:
    """Return the rank of a T-LoRA at a point of the denoising run: min_rank + progress * (rank - min_rank)."""
    min_rank = min(min_rank, rank)
    return min_rank + math.floor(progress * (rank - min_rank) + 1e-6)


def truncate_layer(layer: LoRALayer, rank: int) -> LoRALayer:
    """Return the layer with its first `rank` directions only, at unchanged scale.

    The layer keeps its truncations, because patches compare layers by identity from step to step.
    """
    if rank >= layer.rank:
        return layer
    by_rank = layer.truncations
    if rank not in by_rank:
        up = layer.up[:, :rank].contiguous()
        by_rank[rank] = LoRALayer(down=layer.down[:rank], up=up, alpha=layer.scale * rank)
    return by_rank[rank]
