"""Layers, blends and comparisons for tests of consensus methods."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Generator, Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.combine.methods import combine_by_consensus
from lora_diffusion.config.combine import ConsensusConfig, ConsensusMethod

PATH = "unet.mid_block.attentions.0.proj_in"
ALL = get_args(ConsensusMethod)
SEEDED = ("dare", "della")


def lora(seed: int, *, rank: int = 3, out: int = 12, inner: tuple[int, ...] = (10,), alpha: float = 2.0) -> LoRALayer:
    rng = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=rng)
    return LoRALayer(down=torch.randn(rank, *inner, generator=rng), up=up, alpha=alpha)


def delta64(layer: LoRALayer) -> Tensor:
    """Return alpha / rank * up @ down as a dense float64 matrix, kernels flattened."""
    return layer.alpha / layer.rank * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))


def stack_of(seed: int, count: int = 3, shape: tuple[int, int] = (4, 5)) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def blend_of(layers: Sequence[LoRALayer], weights: Sequence[float]) -> Blend:
    adapters = (Adapter(layers={PATH: layer}) for layer in layers)
    return Blend(entries=tuple(WeightedAdapter(adapter=a, weight=w) for a, w in zip(adapters, weights, strict=True)))


def merged(blend: Blend, config: ConsensusConfig) -> Tensor:
    """Return the merged delta of one module as a float64 matrix, kernels flattened."""
    layer = combine_by_consensus(blend, config, AdapterMetadata()).layers[PATH]
    assert isinstance(layer, LoRALayer)
    return delta64(layer)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> bool:
    """Return whether two matrices differ by at most this fraction of the second one's norm."""
    return bool((first.double() - second.double()).norm() <= tolerance * second.double().norm() + 1e-12)
