"""Sums of weighted deltas, and a base's weights with such a sum added."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_diffusion.adapters.factor_stack import (
    BiasTerm,
    StackedFactors,
    Term,
    common_weight_shape,
    split_stackable,
    stack_factors,
)
from lora_diffusion.errors import ConfigError


def weighted_deltas(terms: Sequence[Term], base: Tensor | None) -> list[Tensor]:
    """The weighted deltas of layers that cannot be stacked, on the base's device."""
    device = base.device if base is not None else None
    moved = [(w, x.with_factors({name: factor.to(device) for name, factor in x.factors.items()})) for w, x in terms]
    return [weight * layer.delta(base) for weight, layer in moved]


def sum_deltas(terms: Sequence[Term], base: Tensor | None = None) -> Tensor:
    """Sum of the weighted deltas at one module, float32, of the shape and on the device of the `base` weight.

    One product for all LoRA layers together. Without `base`, which DoRA needs, on the CPU in the layers' own shape.
    """
    joinable, others = split_stackable(terms)
    deltas = weighted_deltas(others, base)
    if joinable:
        stack = stack_factors([layer for _, layer in joinable], base.device if base is not None else None)
        product = stack.weighted_up(joinable) @ stack.down
        deltas.insert(0, product.reshape(base.shape if base is not None else common_weight_shape(joinable)))
    shape = deltas[0].shape if base is None else base.shape
    return functools.reduce(torch.add, (delta.reshape(shape) for delta in deltas))


def compute_blended_weight(
    base: Tensor, terms: Sequence[Term], *, stack: StackedFactors | None = None, out: Tensor | None = None
) -> Tensor:
    """The base's weight plus the sum of the terms, in float32.

    All LoRA layers are one product, added to the base as it is computed; the other kinds' deltas follow one by one.
    `stack` holds the factors of the former, if they are at hand; `out`, float32 and not the base, is written to.
    """
    joinable, others = split_stackable(terms)
    value = base.float()
    if out is None and value is not base:
        out = value  # a copy of our own already
    if joinable:
        stack = stack or stack_factors([layer for _, layer in joinable], base.device)
        up = stack.weighted_up(joinable)
        flat = None if out is None else out.view(up.shape[0], -1)
        value = torch.addmm(value.reshape(up.shape[0], -1), up, stack.down, out=flat).reshape(base.shape)
    for delta in weighted_deltas(others, base):
        value = torch.add(value, delta.reshape(base.shape), out=out)
    return value


def compute_blended_bias(base: Tensor, terms: Sequence[BiasTerm]) -> Tensor:
    """The base's bias plus the weighted biases, in float32."""
    return functools.reduce(torch.add, (weight * bias.to(base.device).float() for weight, bias in terms), base.float())


def cast_checked(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The blended value in the base's type. Raises ConfigError if it does not fit into that."""
    check_range(value, dtype, name)
    return value.to(dtype)


def check_range(value: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ConfigError if a blended value does not fit into the base's type; its extremes tell, at half the cost."""
    if dtype == torch.float32:
        return
    extremes = torch.stack(torch.aminmax(value)).to(dtype)
    if not bool(extremes.isfinite().all()):
        raise ConfigError(f"{name}: the blended value is beyond the range of {dtype}; lower the weights")
