"""ZipLoRA in closed form: merge two adapters with one coefficient per column, so that overlapping columns give way.

ZipLoRA [arXiv:2311.13600] merges two deltas with a coefficient for each of their columns, that is for each input,

    delta = delta_1 diag(m1) + delta_2 diag(m2),

and trains m1 and m2 by gradient descent on the base model: the merged model should predict what each adapter predicts
on its own prompts, with a penalty on |m1 . m2| per layer. This module needs neither base model nor prompts. With d1 and
d2 the weighted columns of one input, each pair of coefficients minimizes

    |d1|^2 (m1 - 1)^2 + |d2|^2 (m2 - 1)^2 + 2 penalty |<m1 d1, m2 d2>|,    m1, m2 >= 0.

Differences from the paper:

- The merge preserves each adapter's weights instead of its predictions, as if all inputs were equally strong and
  independent.
- The penalty multiplies the product of the coefficients by the overlap of the two columns. Orthogonal columns are thus
  unchanged, where the paper's penalty would reduce every coefficient.
- Coefficients are never negative.

Since |<d1, d2>| <= |d1| |d2|, the objective is convex for a penalty below 1. Its minimum either solves two linear
equations or has one coefficient 0 and the other 1.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_diffusion.adapters.factor_stack import Term, join_layers
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.combine.core_space import scaled_factors


def zip_layers(terms: Sequence[tuple[float, LoRALayer]], penalty: float) -> LoRALayer:
    """Merge two weighted LoRA layers of one module; their ranks add up.

    Two equal columns give 2 / (1 + penalty) times one of them. If two columns point in nearly the same direction and
    one is much longer, it is kept and the other is dropped.

    Args:
        terms: Two pairs of weight and layer.
        penalty: From 0, which gives the plain sum, to below 1.
    """
    first, second = terms
    coefficients = zip_coefficients(first, second, penalty)
    scaled: list[Term] = [
        (weight, replace(layer, down=(layer.down.double().flatten(1) * columns).reshape(layer.down.shape).float()))
        for (weight, layer), columns in zip(terms, coefficients, strict=True)
    ]
    return join_layers(scaled)


def zip_coefficients(
    first: tuple[float, LoRALayer], second: tuple[float, LoRALayer], penalty: float
) -> tuple[Tensor, Tensor]:
    """Compute the coefficients m1 and m2 of the columns of two weighted layers.

    The inner products of the columns follow from the factors; no dense delta is formed.

    Returns:
        Two tensors (in * kh * kw,) of numbers from 0 to 1, float64.
    """
    (up1, down1), (up2, down2) = _weighted_factors(*first), _weighted_factors(*second)
    own1, own2 = _column_products(up1, down1, up1, down1), _column_products(up2, down2, up2, down2)
    return solve_coefficients(own1, own2, penalty * _column_products(up1, down1, up2, down2).abs())


def solve_coefficients(own1: Tensor, own2: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Minimize own1 (m1 - 1)^2 + own2 (m2 - 1)^2 + 2 shared m1 m2 over m1, m2 >= 0, for each column.

    The gradient is 0 where own1 m1 + shared m2 = own1 and shared m1 + own2 m2 = own2. If this solution has a negative
    coefficient, the minimum is where that one is 0 and the other is 1. Where `shared` is 0, both are 1.

    Args:
        own1: Squared norms of the first layer's columns (n,).
        own2: Squared norms of the second layer's columns (n,).
        shared: Absolute inner products of the columns times the penalty (n,), with shared^2 < own1 * own2.

    Returns:
        m1 and m2, each (n,).
    """
    determinant = own1 * own2 - shared.square()
    inside1, inside2 = own2 * (own1 - shared) / determinant, own1 * (own2 - shared) / determinant
    first = torch.where(own1 <= shared, 0, torch.where(own2 <= shared, 1, inside1))
    second = torch.where(own2 <= shared, 0, torch.where(own1 <= shared, 1, inside2))
    is_orthogonal = shared == 0
    return torch.where(is_orthogonal, 1, first), torch.where(is_orthogonal, 1, second)


def _weighted_factors(weight: float, layer: LoRALayer) -> tuple[Tensor, Tensor]:
    up, down = scaled_factors(layer)
    return weight * up, down


def _column_products(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
    """Return the inner products (in,) of the columns of up1 @ down1 with those of up2 @ down2."""
    return ((up1.T @ up2 @ down2) * down1).sum(0)
