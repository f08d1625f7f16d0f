"""Stack the factors of several LoRA layers of one module, so that the sum of their deltas is one product."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.errors import ConfigError

Term = tuple[float, Layer]
"""Coefficient and layer."""
BiasTerm = tuple[float, Tensor]
"""Coefficient and bias, (out,)."""


def is_joinable(layer: Layer) -> bool:
    """Return whether the factors of a layer can be stacked with those of others: plain LoRA without a Tucker core."""
    return isinstance(layer, LoRALayer) and layer.mid is None


@dataclass(frozen=True, kw_only=True, eq=False)
class StackedFactors:
    """Factors of several LoRA layers of one module, concatenated along the rank and on one device, without weights.

    Averaging the factors instead of stacking them would add cross terms up_i @ down_j.
    """

    up: Tensor = field(repr=False)
    """(out, sum of ranks), in the dtype of the layers."""
    down: Tensor = field(repr=False)
    """(sum of ranks, in), in float32; convolution kernels are flattened into `in`."""
    ranks: tuple[int, ...]
    """Rank of each layer."""
    scales: tuple[float, ...]
    """alpha / rank of each layer."""

    def weighted_up(self, terms: Sequence[Term]) -> Tensor:
        """Return `up` with the columns of each layer times its scale and its coefficient in `terms`, in float32."""
        factors = tuple(weight * scale for (weight, _), scale in zip(terms, self.scales, strict=True))
        return torch.mul(self.up, _repeat_by_rank(factors, self.ranks, self.up.device)).float()


@functools.lru_cache(maxsize=16)  # most modules of a blend have the same factors and ranks
def _repeat_by_rank(factors: tuple[float, ...], ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Repeat each factor as often as its rank, in float32."""
    return torch.tensor([value for value, rank in zip(factors, ranks, strict=True) for _ in range(rank)], device=device)


def stack_factors(layers: Sequence[Layer], device: torch.device | None = None) -> StackedFactors:
    """Stack the factors of plain LoRA layers.

    Args:
        layers: Layers of one module.
        device: Device of the result; by default that of the layers.

    Raises:
        ConfigError: If a layer is not a plain LoRA layer.
    """
    plain = [layer for layer in layers if isinstance(layer, LoRALayer) and layer.mid is None]
    if len(plain) < len(layers):
        kinds = sorted({layer.kind for layer in layers if not is_joinable(layer)})
        raise ConfigError(
            f"the factors of {', '.join(kinds)} layers cannot be stacked; only plain LoRA combines exactly"
        )
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
    """Combine weighted LoRA layers of one module into a single layer with the same delta.

    Returns:
        A float32 layer of scale 1, whose rank is the sum of the ranks.

    Raises:
        ConfigError: If a layer is not a plain LoRA layer.
    """
    stack = stack_factors([layer for _, layer in terms])
    shape = common_weight_shape(terms)
    up = stack.weighted_up(terms)
    ones = [1] * len(shape[2:])
    rank = stack.down.shape[0]
    return LoRALayer(down=stack.down.reshape(rank, *shape[1:]), up=up.reshape(*up.shape, *ones), alpha=float(rank))


def split_stackable(terms: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    """Split terms into those whose factors can be stacked and the others."""
    return [term for term in terms if is_joinable(term[1])], [term for term in terms if not is_joinable(term[1])]


def common_weight_shape(terms: Sequence[Term]) -> tuple[int, ...]:
    """Return the most detailed weight shape among the layers, so that a 1x1 kernel is kept if any layer has it."""
    return max((layer.weight_shape for _, layer in terms), key=len)
