"""Factors of several LoRA layers of one module, side by side."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.errors import ConfigError

Term = tuple[float, Layer]
"""A layer and its coefficient."""
BiasTerm = tuple[float, Tensor]


def is_joinable(layer: Layer) -> bool:
    """Whether its factors can be stacked with others': plain LoRA, without a Tucker core."""
    return isinstance(layer, LoRALayer) and layer.mid is None


@dataclass(frozen=True, kw_only=True, eq=False)
class StackedFactors:
    """The factors of several LoRA layers of one module, side by side on one device; weights come later.

    `up` is (out, sum of ranks) in the type of the layers, `down` (sum of ranks, in) in float32, kernels flattened.
    Averaging factors instead of stacking them would add cross terms up_i @ down_j.
    """

    up: Tensor
    down: Tensor
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def weighted_up(self, terms: Sequence[Term]) -> Tensor:
        """`up` with each layer's columns times its scale and its coefficient in `terms`, float32."""
        factors = tuple(weight * scale for (weight, _), scale in zip(terms, self.scales, strict=True))
        return torch.mul(self.up, repeat_by_rank(factors, self.ranks, self.up.device)).float()


@functools.lru_cache(maxsize=16)
def repeat_by_rank(factors: tuple[float, ...], ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Each factor as often as its rank, float32; most modules of a blend ask for the very same ones."""
    return torch.tensor([value for value, rank in zip(factors, ranks, strict=True) for _ in range(rank)], device=device)


def stack_factors(layers: Sequence[Layer], device: torch.device | None = None) -> StackedFactors:
    """Plain LoRA layers as one pair of factors. Raises ConfigError for a kind whose factors cannot be stacked."""
    plain = [layer for layer in layers if isinstance(layer, LoRALayer) and layer.mid is None]
    if len(plain) < len(layers):
        kinds = sorted({layer.kind for layer in layers if not is_joinable(layer)})
        raise ConfigError(f"{', '.join(kinds)} layers have no factors to stack; only plain LoRA combines exactly")
    ups, downs = [layer.up.flatten(1) for layer in plain], [layer.down.flatten(1) for layer in plain]
    if len({(tensor.dtype, tensor.device) for tensor in (*ups, *downs)}) > 1:
        ups, downs = ([tensor.to(device, torch.float32) for tensor in tensors] for tensors in (ups, downs))
    return StackedFactors(
        up=(torch.cat(ups, dim=1) if len(ups) > 1 else ups[0]).to(device),
        down=(torch.cat(downs, dim=0) if len(downs) > 1 else downs[0]).to(device, torch.float32),
        ranks=tuple(layer.rank for layer in plain),
        scales=tuple(layer.scale for layer in plain),
    )


def join_layers(terms: Sequence[Term]) -> LoRALayer:
    """Weighted LoRA layers of one module as a single layer of scale 1 in float32: factors stacked, ranks added.

    Raises ConfigError for a kind whose factors cannot be stacked.
    """
    stack = stack_factors([layer for _, layer in terms])
    shape = common_weight_shape(terms)
    up = stack.weighted_up(terms)
    ones = [1] * len(shape[2:])
    rank = stack.down.shape[0]
    return LoRALayer(down=stack.down.reshape(rank, *shape[1:]), up=up.reshape(*up.shape, *ones), alpha=float(rank))


def split_stackable(terms: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    """Those whose factors can be stacked, and the others."""
    return [term for term in terms if is_joinable(term[1])], [term for term in terms if not is_joinable(term[1])]


def common_weight_shape(terms: Sequence[Term]) -> tuple[int, ...]:
    return max((layer.weight_shape for _, layer in terms), key=len)
