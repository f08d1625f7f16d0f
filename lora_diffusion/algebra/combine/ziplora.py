"""ZipLoRA with coefficients in closed form: two adapters whose columns share the inputs instead of adding up on them.

ZipLoRA [arXiv:2311.13600] merges two deltas with one coefficient for each of their columns, that is for each input,

    delta = delta_1 diag(m1) + delta_2 diag(m2),

and fits them by gradient descent on the base: the merged model's predictions shall be those of each adapter on its own
prompts, with a penalty on |m1 . m2| for each layer. Here the base and the prompts are not needed. With d1 and d2 the
two columns at an input, weights included, each pair of coefficients is the least of

    |d1|^2 (m1 - 1)^2 + |d2|^2 (m2 - 1)^2 + 2 penalty |<m1 d1, m2 d2>|,    m1, m2 >= 0.

It departs from the paper in three ways. What each adapter does is kept in its weights, not in predictions, as if all
inputs were equally strong and independent. The penalty weighs the product of coefficients with the overlap of the very
columns that they scale, so that columns at right angles are left as they are, where the paper would press every
coefficient. And coefficients are not negative. As |<d1, d2>| is at most |d1| |d2|, the function is convex for a penalty
below 1, so that its least is the solution of two linear equations, or has one coefficient 0 and the other 1.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_diffusion.adapters.factor_stack import Term, join_layers
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.combine.core_space import scaled_factors


def zip_layers(terms: Sequence[tuple[float, LoRALayer]], penalty: float) -> LoRALayer:
    """Two weighted LoRA layers of one module as one; ranks add up. `penalty` is from 0, the plain sum, to below 1.

    Equal columns come to 2 / (1 + penalty) of one of them. Where two columns point much the same way and one is far
    longer, it is kept and the other is left out.
    """
    first, second = terms
    coefficients = zip_coefficients(first, second, penalty)
    scaled: list[Term] = [
        (weight, replace(layer, down=(layer.down.double().flatten(1) * shares).reshape(layer.down.shape).float()))
        for (weight, layer), shares in zip(terms, coefficients, strict=True)
    ]
    return join_layers(scaled)


def zip_coefficients(
    first: tuple[float, LoRALayer], second: tuple[float, LoRALayer], penalty: float
) -> tuple[Tensor, Tensor]:
    """m1 and m2, one for each column (in * kernel,), float64, from 0 to 1.

    The columns' inner products come from the factors: those of up (rank x rank), and the columns of down.
    """
    (up1, down1), (up2, down2) = weighted_factors(*first), weighted_factors(*second)
    own1, own2 = column_products(up1, down1, up1, down1), column_products(up2, down2, up2, down2)
    return solve_coefficients(own1, own2, penalty * column_products(up1, down1, up2, down2).abs())


def solve_coefficients(own1: Tensor, own2: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """The least of own1 (m1 - 1)^2 + own2 (m2 - 1)^2 + 2 shared m1 m2 over m1, m2 >= 0, for shared^2 < own1 own2.

    Its gradient is zero where own1 m1 + shared m2 = own1 and shared m1 + own2 m2 = own2. If that makes one coefficient
    negative, the least is where that one is 0, and the other then 1. Where nothing is shared, both are 1.
    """
    determinant = own1 * own2 - shared.square()
    inside1, inside2 = own2 * (own1 - shared) / determinant, own1 * (own2 - shared) / determinant
    first = torch.where(own1 <= shared, 0, torch.where(own2 <= shared, 1, inside1))
    second = torch.where(own2 <= shared, 0, torch.where(own1 <= shared, 1, inside2))
    alone = shared == 0
    return torch.where(alone, 1, first), torch.where(alone, 1, second)


def weighted_factors(weight: float, layer: LoRALayer) -> tuple[Tensor, Tensor]:
    up, down = scaled_factors(layer)
    return weight * up, down


def column_products(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
    """The inner product of up1 @ down1 and up2 @ down2 in each column."""
    return ((up1.T @ up2 @ down2) * down1).sum(0)
