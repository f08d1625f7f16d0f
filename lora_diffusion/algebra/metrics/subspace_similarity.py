"""How alike the directions of two deltas are: the measures of section 7.2 of LoRA [arXiv:2106.09685].

A delta's output directions are its left singular vectors, its input directions the right ones, strongest first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.algebra.metrics.spectra import MOST_DIRECTIONS, nonzero_values
from lora_diffusion.algebra.svd.svd import Spectrum, thin_svd


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Orthonormal columns, strongest first, float64."""

    output: Tensor
    """(out, k)."""
    input: Tensor
    """(in * kernel, k)."""


def leading_directions(spectrum: Spectrum) -> Directions:
    """The singular vectors whose values are no rounding, the first 128."""
    count = min(nonzero_values(spectrum).numel(), MOST_DIRECTIONS)
    return Directions(output=spectrum.left[:, :count].double(), input=spectrum.right[:count].T.double())


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi(i, j) for the first i columns of one and the first j of the other, float64 (m, n) of values in [0, 1].

        phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j)

    `first` (dim, m) and `second` (dim, n) have orthonormal columns. 1 says that the smaller subspace lies inside the
    larger, 0 that they are orthogonal. With d the projection metric between subspaces of equal dimension p, phi is
    1 - d^2 / p [section 7.2 and appendix G].
    """
    sums = (first.T @ second).square().cumsum(0).cumsum(1)
    return (sums / smaller_index_grid(first.shape[1], second.shape[1])).clamp(
        0, 1
    )  # float32 vectors are a rounding too long


def random_similarity(first: int, second: int, dim: int) -> Tensor:
    """What phi is on average for random subspaces of a space of `dim` dimensions, float64 (first, second).

    E ||U_i^T V_j||_F^2 = i j / dim, so that phi is max(i, j) / dim.
    """
    i, j = torch.arange(1, first + 1).double(), torch.arange(1, second + 1).double()
    return i[:, None] * j[None] / dim / smaller_index_grid(first, second)


def smaller_index_grid(first: int, second: int) -> Tensor:
    """min(i, j) for i and j from 1, float64 (first, second)."""
    return torch.minimum(torch.arange(1, first + 1)[:, None], torch.arange(1, second + 1)[None]).double()


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """The angles between two subspaces in radians, rising, float64 (min(m, n),).

    Small ones from their sines, large ones from their cosines, as each is exact there [Björck and Golub 1973].
    """
    larger, smaller = (first, second) if first.shape[1] >= second.shape[1] else (second, first)
    shadow = larger.T @ smaller
    cosines = thin_svd(shadow)[1]
    sines = thin_svd(smaller - larger @ shadow)[1].flip(0)
    return torch.atan2(sines, cosines)


def grassmann_distance(first: Tensor, second: Tensor) -> float:
    """The geodesic distance between two subspaces: the root of the sum of squared principal angles, in radians.

    Of subspaces of different dimensions, that of the smaller to the nearest one inside the larger [arXiv:1407.0900].
    """
    return float(principal_angles(first, second).square().sum().sqrt())


@dataclass(frozen=True, kw_only=True, eq=False)
class SubspaceSimilarity:
    """How alike two adapters' directions are on one side of a module."""

    similarity: Tensor
    """phi(i, j), (m, n)."""
    random: Tensor
    """The same on average for random directions."""
    distance: float
    """Grassmann, in radians, of all directions."""
    largest_distance: float
    """Of orthogonal ones: a right angle each."""


def compare_subspaces(first: Tensor, second: Tensor) -> SubspaceSimilarity:
    """All measures of two sets of orthonormal columns, (dim, m) and (dim, n), none of which is empty."""
    m, n = first.shape[1], second.shape[1]
    return SubspaceSimilarity(
        similarity=subspace_similarity(first, second),
        random=random_similarity(m, n, first.shape[0]),
        distance=grassmann_distance(first, second),
        largest_distance=math.pi / 2 * min(m, n) ** 0.5,
    )


def mean_grid(grids: Sequence[Tensor]) -> Tensor:
    """The mean of grids phi(i, j) of different sizes, each cell over those that have it."""
    size = [max(grid.shape[side] for grid in grids) for side in (0, 1)]
    sums, counts = torch.zeros(*size, dtype=torch.float64), torch.zeros(*size, dtype=torch.float64)
    for grid in grids:
        sums[: grid.shape[0], : grid.shape[1]] += grid
        counts[: grid.shape[0], : grid.shape[1]] += 1
    return sums / counts
