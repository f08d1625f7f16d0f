"""Compute sums of weighted deltas, and add them to the weights of a base model."""

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
    """Compute the weighted delta of each layer separately, on the device of `base`.

    Args:
        terms: Layers of any kind with their coefficients.
        base: Weight of the base model; required for DoRA.
    """
    device = base.device if base is not None else None
    moved = [(w, x.with_factors({name: factor.to(device) for name, factor in x.factors.items()})) for w, x in terms]
    return [weight * layer.delta(base) for weight, layer in moved]


def sum_deltas(terms: Sequence[Term], base: Tensor | None = None) -> Tensor:
    """Sum the weighted deltas of one module in float32.

    The stacked factors of all LoRA layers are multiplied at once.

    Args:
        terms: Layers of the module with their coefficients; at least one.
        base: Weight of the base model, which determines shape and device of the result; required for DoRA.

    Returns:
        The sum, of the shape of `base`, or of the layers' own shape if `base` is None.
    """
    stackable, others = split_stackable(terms)
    deltas = weighted_deltas(others, base)
    if stackable:
        stack = stack_factors([layer for _, layer in stackable], base.device if base is not None else None)
        product = stack.weighted_up(stackable) @ stack.down
        deltas.insert(0, product.reshape(base.shape if base is not None else common_weight_shape(stackable)))
    shape = deltas[0].shape if base is None else base.shape
    return functools.reduce(torch.add, (delta.reshape(shape) for delta in deltas))


def compute_blended_weight(
    base: Tensor, terms: Sequence[Term], *, stack: StackedFactors | None = None, out: Tensor | None = None
) -> Tensor:
    """Add the weighted deltas of one module to the weight of the base model, in float32.

    All LoRA layers are multiplied and added in one `addmm`; the deltas of other kinds are added one by one.

    Args:
        base: Weight of the base model.
        terms: Layers of the module with their coefficients.
        stack: Stacked factors of the LoRA layers in `terms`, if they are already available.
        out: float32 tensor to write the result to; must not be `base`.
    """
    stackable, others = split_stackable(terms)
    value = base.float()
    if out is None and value is not base:
        out = value  # `float` made a copy, which may be overwritten
    if stackable:
        stack = stack or stack_factors([layer for _, layer in stackable], base.device)
        up = stack.weighted_up(stackable)
        flat = None if out is None else out.view(up.shape[0], -1)
        value = torch.addmm(value.reshape(up.shape[0], -1), up, stack.down, out=flat).reshape(base.shape)
    for delta in weighted_deltas(others, base):
        value = torch.add(value, delta.reshape(base.shape), out=out)
    return value


def compute_blended_bias(base: Tensor, terms: Sequence[BiasTerm]) -> Tensor:
    """Add weighted biases to the bias of the base model, in float32."""
    return functools.reduce(torch.add, (weight * bias.to(base.device).float() for weight, bias in terms), base.float())


def cast_checked(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert a blended parameter to the dtype of the base model.

    Args:
        value: Blended parameter in float32.
        dtype: Dtype of the base model.
        name: Name of the parameter for messages.

    Raises:
        ConfigError: If a value is beyond the range of `dtype`.
    """
    check_range(value, dtype, name)
    return value.to(dtype)


def check_range(value: Tensor, dtype: torch.dtype, name: str) -> None:
    """Check that a blended parameter fits into the range of a dtype.

    Only the minimum and maximum are converted, which costs half as much as converting all values.

    Raises:
        ConfigError: If a value is beyond the range of `dtype`, or not finite.
    """
    if dtype == torch.float32:
        return
    extremes = torch.stack(torch.aminmax(value)).to(dtype)
    if not bool(extremes.isfinite().all()):
        raise ConfigError(f"{name}: the blended value is beyond the range of {dtype}; lower the weights")
