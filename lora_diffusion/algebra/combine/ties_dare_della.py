"""TIES, DARE, DELLA, magnitude pruning, geometric median and SLERP: merge a stack of matrices into one.

All functions take matrices (n, p, q) and the user's weights (n,) and are homogeneous of degree 1 in the weights:
multiplying all weights by c > 0 multiplies the result by c. A negative weight negates its matrix before anything is
compared. Random methods draw only from the generator passed in.

TIES, DARE, DELLA and magnitude pruning work on entries, so they depend on the coordinates. Median and SLERP work on
distances and angles, which are the same in every orthonormal basis and thus those of the dense deltas.
"""

import torch
from torch import Generator, Tensor

from lora_diffusion.algebra.combine.geometric_median import median_shares
from lora_diffusion.config.combine import Disjoint

_PARALLEL_TOLERANCE = 1e-6
"""Matrices with 1 - |cosine| below this count as parallel, so SLERP has no arc to follow."""


def _apply_weights(stack: Tensor, weights: Tensor) -> Tensor:
    return weights[:, None, None] * stack


def _trim_by_magnitude(stack: Tensor, density: float) -> Tensor:
    """Keep the fraction `density` of each matrix's entries with the largest magnitudes, at least one; zero the rest."""
    size = stack[0].numel()
    count = max(1, round(density * size))
    threshold = stack.abs().flatten(1).kthvalue(size - count + 1, dim=1).values
    return torch.where(stack.abs() >= threshold[:, None, None], stack, 0)


def _elect_signs(stack: Tensor, disjoint: Disjoint) -> Tensor:
    """Merge the entries whose sign agrees with that of their sum over the stack; the result is 0 where the sum is 0."""
    sign = stack.sum(0).sign()
    agreeing = torch.where(stack * sign > 0, stack, 0)
    summed = agreeing.sum(0)
    return summed / (agreeing != 0).sum(0).clamp(min=1) if disjoint == "mean" else summed


def ties(stack: Tensor, weights: Tensor, *, density: float, disjoint: Disjoint) -> Tensor:
    """Merge by TIES [arXiv:2306.01708]: trim each matrix, apply the weights, elect signs, merge what agrees.

    Args:
        stack: Matrices (n, p, q).
        weights: Weights (n,).
        density: Fraction of entries that trimming keeps.
        disjoint: "mean" as in the paper, with the strength of a single matrix, or "sum", which equals the weighted sum
            at density 1 where all signs agree.

    Returns:
        Merged matrix (p, q).
    """
    return _elect_signs(_apply_weights(_trim_by_magnitude(stack, density), weights), disjoint)


def magnitude(stack: Tensor, weights: Tensor, *, density: float) -> Tensor:
    """Sum the weighted matrices after setting the smallest entries of each to 0; linear in the weights.

    Args:
        stack: Matrices (n, p, q).
        weights: Weights (n,).
        density: Fraction of entries that are kept.

    Returns:
        Merged matrix (p, q).
    """
    return _apply_weights(_trim_by_magnitude(stack, density), weights).sum(0)


def dare(stack: Tensor, weights: Tensor, *, density: float, generator: Generator) -> Tensor:
    """Merge by DARE [arXiv:2311.03099]: drop random entries, rescale the others by 1 / density, sum with weights.

    The expected value is the weighted sum; linear in the weights.

    Args:
        stack: Matrices (n, p, q).
        weights: Weights (n,).
        density: Probability of keeping an entry.
        generator: Source of random numbers.

    Returns:
        Merged matrix (p, q).
    """
    return _apply_weights(_drop_entries(stack, torch.full_like(stack, density), generator), weights).sum(0)


def della(
    stack: Tensor, weights: Tensor, *, density: float, spread: float, disjoint: Disjoint, generator: Generator
) -> Tensor:
    """Merge by DELLA [arXiv:2406.11617]: drop random entries, small ones more often, rescale, then merge as TIES does.

    The probability of keeping an entry rises linearly with its magnitude rank from density - spread * margin to
    density + spread * margin, where margin = min(density, 1 - density); the paper's epsilon is 2 * spread * margin.
    Entries are ranked within the whole matrix. The paper ranks them within each output row, but the rows of a core in
    Core Space do not correspond to neurons.

    Args:
        stack: Matrices (n, p, q).
        weights: Weights (n,).
        density: Mean probability of keeping an entry.
        spread: From 0 (the same probability for all entries) to below 1.
        disjoint: How entries that agree in sign are merged, as in `ties`.
        generator: Source of random numbers.

    Returns:
        Merged matrix (p, q).
    """
    margin = spread * min(density, 1 - density)
    keep = density + margin * (2 * _rank_by_magnitude(stack) - 1)
    return _elect_signs(_apply_weights(_drop_entries(stack, keep, generator), weights), disjoint)


def _rank_by_magnitude(stack: Tensor) -> Tensor:
    """Return the magnitude rank of each entry within its matrix, linearly from 0 (smallest) to 1 (largest)."""
    ranks = stack.abs().flatten(1).argsort(dim=1).argsort(dim=1).to(stack.dtype)
    return (ranks / max(1, ranks.shape[1] - 1)).reshape(stack.shape)


def _drop_entries(stack: Tensor, keep: Tensor, generator: Generator) -> Tensor:
    """Keep each entry with its own probability, divided by that probability; set the others to 0."""
    draws = torch.rand(stack.shape, generator=generator, dtype=torch.float64)
    return torch.where(draws < keep, stack / keep, 0)


def median(stack: Tensor, weights: Tensor) -> Tensor:
    """Return the geometric median of the weighted matrices, which minimizes the sum of Frobenius distances to them.

    An outlier hardly moves it. It has the strength of a single matrix, not of the sum; of two matrices it is the mean.

    Args:
        stack: Matrices (n, p, q).
        weights: Weights (n,).

    Returns:
        Merged matrix (p, q).
    """
    points = _apply_weights(stack, weights)
    return _apply_weights(points, median_shares(points.flatten(1))).sum(0)


def slerp(stack: Tensor, weights: Tensor) -> Tensor:
    """Interpolate spherically between two matrices.

    The interpolation parameter is t = |w2| / (|w1| + |w2|) and the norm of the result |w1| |x1| + |w2| |x2|, which the
    weighted sum would have if both pointed the same way. A matrix merged with itself thus gives the weighted sum, and
    weights 1 - t and t give the usual SLERP with a linearly interpolated norm. If the matrices are nearly parallel or
    opposite, or one is 0, the result is the weighted sum.

    Args:
        stack: Matrices (2, p, q).
        weights: Weights (2,).

    Returns:
        Merged matrix (p, q).
    """
    first, second = weights.sign()[:, None, None] * stack
    lengths = stack.flatten(1).square().sum(1).sqrt()
    product = lengths.prod()
    cosine = (first * second).sum() / product if product > 0 else torch.ones_like(product)
    if 1 - cosine.abs() < _PARALLEL_TOLERANCE:
        return _apply_weights(stack, weights).sum(0)
    angle = cosine.arccos()
    sizes = weights.abs()
    t = sizes[1] / sizes.sum()
    direction = ((1 - t) * angle).sin() / lengths[0] * first + (t * angle).sin() / lengths[1] * second
    return (sizes * lengths).sum() * direction / angle.sin()
