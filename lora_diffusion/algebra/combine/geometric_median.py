"""Geometric median of a few points in a high-dimensional space, computed from their pairwise distances."""

import torch
from torch import Tensor

_TOLERANCE = 1e-10
"""The iteration stops when the sum of absolute changes of the coefficients falls below this."""
_MAX_ITERATIONS = 10_000
"""Limit for slow convergence, which occurs if the median lies at or very near a point."""
_OPTIMALITY_MARGIN = 1e-9
"""A point must be the unique median by this margin. Between two points every point is a median; the mean is chosen."""


def median_shares(points: Tensor) -> Tensor:
    """Return the coefficients of the geometric median as a convex combination of the points.

    A point is itself the median if the unit vectors from it to all other points sum to a norm below the number of
    points at its position [Vardi and Zhang 2000]. Otherwise Weiszfeld's iteration runs from the mean; each coefficient
    is inversely proportional to the point's distance from the current estimate. All estimates lie in the convex hull,
    so pairwise distances suffice and an iteration costs n^2.

    Args:
        points: Points (n, d).

    Returns:
        Coefficients (n,) with sum 1; coefficients @ points minimizes the sum of Euclidean distances to the points.
    """
    squared = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    for index in range(len(points)):
        if _is_median(squared, index):
            return torch.nn.functional.one_hot(torch.tensor(index), len(points)).to(points.dtype)
    shares = torch.full_like(squared[0], 1 / len(points))
    for _ in range(_MAX_ITERATIONS):
        inverse = _distances_to_combination(squared, shares).reciprocal()
        previous, shares = shares, inverse / inverse.sum()
        if (shares - previous).abs().sum() < _TOLERANCE:
            break
    return shares


def _distances_to_combination(squared: Tensor, shares: Tensor) -> Tensor:
    """Return the distances (n,) from shares @ points to each point, given all squared pairwise distances (n, n)."""
    to_points = squared @ shares
    return (to_points - shares @ to_points / 2).clamp(min=torch.finfo(squared.dtype).tiny).sqrt()


def _is_median(squared: Tensor, index: int) -> bool:
    """Return whether one of the points is the unique minimum of the sum of distances."""
    elsewhere = squared[index] > 0
    squared_distances = squared[index][elsewhere]
    inner_products = (squared_distances[:, None] + squared_distances[None] - squared[elsewhere][:, elsewhere]) / 2
    inverse_lengths = squared_distances.rsqrt()
    pull = (inverse_lengths @ inner_products @ inverse_lengths).clamp(min=0).sqrt()
    return float(pull) < int((~elsewhere).sum()) - _OPTIMALITY_MARGIN
