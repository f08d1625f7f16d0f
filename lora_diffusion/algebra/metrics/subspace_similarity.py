"""Similarity of the subspaces that two deltas span: section 7.2 of the LoRA paper [arXiv:2106.09685].

The output directions of a delta are its left singular vectors and the input directions its right singular vectors, in
descending order of the singular values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diffusion.algebra.metrics.spectra import MAX_DIRECTIONS, nonzero_values
from lora_diffusion.algebra.svd.svd import Spectrum, thin_svd


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Leading singular vectors of a delta as orthonormal columns, float64."""

    output: Tensor = field(repr=False)
    """Left singular vectors (out, k)."""
    input: Tensor = field(repr=False)
    """Right singular vectors (in * kh * kw, k)."""


def leading_directions(spectrum: Spectrum) -> Directions:
    """Return the singular vectors whose values exceed the float32 rounding error, at most the first 128."""
    count = min(nonzero_values(spectrum).numel(), MAX_DIRECTIONS)
    return Directions(output=spectrum.left[:, :count].double(), input=spectrum.right[:count].T.double())


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return phi(i, j), the similarity of the first i columns of one basis and the first j columns of another.

        phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j)

    The value is 1 if the smaller subspace lies inside the larger one and 0 if they are orthogonal. With d the
    projection metric between subspaces of equal dimension p, phi = 1 - d^2 / p [section 7.2 and appendix G].

    Args:
        first: Orthonormal columns (dim, m).
        second: Orthonormal columns (dim, n).

    Returns:
        Values from 0 to 1, float64 (m, n).
    """
    sums = (first.T @ second).square().cumsum(0).cumsum(1)
    # Singular vectors computed in float32 may be slightly longer than 1.
    return (sums / _smaller_index_grid(first.shape[1], second.shape[1])).clamp(0, 1)


def random_similarity(first: int, second: int, dim: int) -> Tensor:
    """Return the expected phi(i, j) of random subspaces, which is max(i, j) / dim, as E ||U_i^T V_j||_F^2 = i j / dim.

    Args:
        first: Largest i.
        second: Largest j.
        dim: Dimension of the whole space.

    Returns:
        Expected values, float64 (first, second).
    """
    i, j = torch.arange(1, first + 1).double(), torch.arange(1, second + 1).double()
    return i[:, None] * j[None] / dim / _smaller_index_grid(first, second)


def _smaller_index_grid(first: int, second: int) -> Tensor:
    """Return min(i, j) for i and j counted from 1, float64 (first, second)."""
    return torch.minimum(torch.arange(1, first + 1)[:, None], torch.arange(1, second + 1)[None]).double()


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the principal angles between two subspaces.

    Small angles come from their sines and large ones from their cosines, where each is accurate [Björck and Golub
    1973].

    Args:
        first: Orthonormal columns (dim, m).
        second: Orthonormal columns (dim, n).

    Returns:
        Angles in radians in ascending order, float64 (min(m, n),).
    """
    larger, smaller = (first, second) if first.shape[1] >= second.shape[1] else (second, first)
    projection = larger.T @ smaller
    cosines = thin_svd(projection)[1]
    sines = thin_svd(smaller - larger @ projection)[1].flip(0)
    return torch.atan2(sines, cosines)


def grassmann_distance(first: Tensor, second: Tensor) -> float:
    """Return the geodesic distance of two subspaces in radians: the root of the sum of squared principal angles.

    For subspaces of different dimensions this is the distance from the smaller one to the nearest subspace of its
    dimension inside the larger one [arXiv:1407.0900].
    """
    return float(principal_angles(first, second).square().sum().sqrt())


@dataclass(frozen=True, kw_only=True, eq=False)
class SubspaceSimilarity:
    """Similarity of the output or the input directions of two adapters at one module."""

    similarity: Tensor = field(repr=False)
    """phi(i, j), float64 (m, n)."""
    random: Tensor = field(repr=False)
    """Expected phi(i, j) of random directions, float64 (m, n)."""
    distance: float
    """Grassmann distance of all directions, in radians."""
    largest_distance: float
    """Grassmann distance of orthogonal subspaces of these dimensions, the maximum."""


def compare_subspaces(first: Tensor, second: Tensor) -> SubspaceSimilarity:
    """Compute all similarity measures of two bases with orthonormal columns, (dim, m) and (dim, n), with m, n >= 1."""
    m, n = first.shape[1], second.shape[1]
    return SubspaceSimilarity(
        similarity=subspace_similarity(first, second),
        random=random_similarity(m, n, first.shape[0]),
        distance=grassmann_distance(first, second),
        largest_distance=math.pi / 2 * min(m, n) ** 0.5,
    )


def mean_grid(grids: Sequence[Tensor]) -> Tensor:
    """Average grids phi(i, j) of different sizes; each cell is the mean over the grids that contain it."""
    size = [max(grid.shape[side] for grid in grids) for side in (0, 1)]
    sums, counts = torch.zeros(*size, dtype=torch.float64), torch.zeros(*size, dtype=torch.float64)
    for grid in grids:
        sums[: grid.shape[0], : grid.shape[1]] += grid
        counts[: grid.shape[0], : grid.shape[1]] += 1
    return sums / counts
