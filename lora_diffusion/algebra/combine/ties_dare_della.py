"""Rules that make one matrix of several: pure functions on a stack (n, p, q) and the user's weights (n,).

Every rule is of degree 1 in the weights: all weights times c, above 0, give the result times c. A negative weight turns
its matrix around before anything is compared. Random rules draw from the generator that is given and from no other.
TIES, DARE, DELLA and magnitude pruning look at entries, so that the coordinates count; median and SLERP look at
distances and angles, which are the same in every orthonormal basis, and so are those of the whole deltas.
"""

from typing import Literal

import torch
from torch import Generator, Tensor

from lora_diffusion.algebra.combine.geometric_median import median_shares

Disjoint = Literal["mean", "sum"]

PARALLEL = 1e-6
"""Two matrices whose cosine is this close to 1 or -1 leave no arc to go along."""


def apply_weights(stack: Tensor, weights: Tensor) -> Tensor:
    return weights[:, None, None] * stack


def trim_by_magnitude(stack: Tensor, density: float) -> Tensor:
    """Each matrix with only the share `density` of its entries that is largest in magnitude, at least one entry."""
    size = stack[0].numel()
    kept = max(1, round(density * size))
    lowest = stack.abs().flatten(1).kthvalue(size - kept + 1, dim=1).values
    return torch.where(stack.abs() >= lowest[:, None, None], stack, 0)


def elect_signs(stack: Tensor, disjoint: Disjoint) -> Tensor:
    """The mean, or the sum, of those entries that have the sign of their sum over the stack; 0 where that is 0."""
    sign = stack.sum(0).sign()
    agreeing = torch.where(stack * sign > 0, stack, 0)
    total = agreeing.sum(0)
    return total / (agreeing != 0).sum(0).clamp(min=1) if disjoint == "mean" else total


def ties(stack: Tensor, weights: Tensor, *, density: float, disjoint: Disjoint) -> Tensor:
    """TIES [arXiv:2306.01708]: trim each matrix, weight it, elect each entry's sign by total mass, merge what agrees.

    The disjoint mean is the paper's: where k matrices agree it is their mean, so that the result is as strong as one of
    them. The disjoint sum is as strong as their sum, and equals it at density 1 where all signs agree.
    """
    return elect_signs(apply_weights(trim_by_magnitude(stack, density), weights), disjoint)


def magnitude(stack: Tensor, weights: Tensor, *, density: float) -> Tensor:
    """The weighted sum of the matrices, each without its smallest entries. Linear in the weights."""
    return apply_weights(trim_by_magnitude(stack, density), weights).sum(0)


def dare(stack: Tensor, weights: Tensor, *, density: float, generator: Generator) -> Tensor:
    """DARE [arXiv:2311.03099]: the weighted sum after each entry was kept with probability `density`, over `density`.

    Its expectation is the weighted sum; linear in the weights.
    """
    return apply_weights(drop_entries(stack, torch.full_like(stack, density), generator), weights).sum(0)


def della(
    stack: Tensor, weights: Tensor, *, density: float, spread: float, disjoint: Disjoint, generator: Generator
) -> Tensor:
    """DELLA [arXiv:2406.11617]: drop at random, small entries more often, rescale; elect signs and merge as TIES does.

    Keep probabilities rise evenly by magnitude from density - spread * room to density + spread * room, where room is
    the smaller of density and 1 - density: the paper's epsilon is 2 * spread * room. Ranks are those within a whole
    matrix; the paper ranks each output's row, but the rows of a core are no neurons.
    """
    room = spread * min(density, 1 - density)
    keep = density + room * (2 * rank_by_magnitude(stack) - 1)
    return elect_signs(apply_weights(drop_entries(stack, keep, generator), weights), disjoint)


def rank_by_magnitude(stack: Tensor) -> Tensor:
    """Where each entry stands among its matrix's, by magnitude: evenly from 0, the smallest, to 1, the largest."""
    ranks = stack.abs().flatten(1).argsort(dim=1).argsort(dim=1).to(stack.dtype)
    return (ranks / max(1, ranks.shape[1] - 1)).reshape(stack.shape)


def drop_entries(stack: Tensor, keep: Tensor, generator: Generator) -> Tensor:
    """Each entry kept with its own probability and divided by it, else 0."""
    draws = torch.rand(stack.shape, generator=generator, dtype=torch.float64)
    return torch.where(draws < keep, stack / keep, 0)


def median(stack: Tensor, weights: Tensor) -> Tensor:
    """The geometric median of the weighted matrices: the least sum of Frobenius distances to them [Weiszfeld 1937].

    One that is far from all others hardly moves it. As strong as one matrix, not as their sum; of two it is the mean.
    """
    points = apply_weights(stack, weights)
    return apply_weights(points, median_shares(points.flatten(1))).sum(0)


def slerp(stack: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of two matrices: along the arc between their directions, to the share of the second.

    The share is w2 / (w1 + w2). Norm convention: the result has the norm w1 |x1| + w2 |x2|, what the weighted sum would
    have if both pointed the same way, so that one matrix with itself gives the sum, and weights 1 - t and t the usual
    slerp with the norm interpolated linearly. Nearly parallel or opposite ones, or a zero, give the weighted sum.
    """
    first, second = weights.sign()[:, None, None] * stack
    lengths = stack.flatten(1).square().sum(1).sqrt()
    product = lengths.prod()
    cosine = (first * second).sum() / product if product > 0 else torch.ones_like(product)
    if 1 - cosine.abs() < PARALLEL:
        return apply_weights(stack, weights).sum(0)
    angle = cosine.arccos()
    sizes = weights.abs()
    share = sizes[1] / sizes.sum()
    parts = ((1 - share) * angle).sin() / lengths[0] * first + (share * angle).sin() / lengths[1] * second
    return (sizes * lengths).sum() * parts / angle.sin()
