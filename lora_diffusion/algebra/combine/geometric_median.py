"""The geometric median of a few points, from their distances alone."""

import torch
from torch import Tensor

TOLERANCE = 1e-10
"""The iteration ends when the shares of the points change by less than this in all."""
MOST_STEPS = 10_000
"""Where the median lies at or very near a point, Weiszfeld's steps grow short; it may end before the tolerance."""
TIE = 1e-9
"""A point that is a median only to rounding is not preferred: of two points, any between them is, and the mean fair."""


def median_shares(points: Tensor) -> Tensor:
    """Shares (n,) that sum to 1, so that shares @ points (n, d) has the least sum of distances to the points.

    A point is the median if the unit vectors to all others sum to less than the number of points that lie on it
    [Vardi and Zhang 2000]. Otherwise Weiszfeld's iteration runs from the mean, with each point's share inverse to its
    distance. As every step lies in the points' hull, their distances tell all that it needs: a step costs n^2.
    """
    squared = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    for index in range(len(points)):
        if is_median(squared, index):
            return torch.nn.functional.one_hot(torch.tensor(index), len(points)).to(points.dtype)
    shares = torch.full_like(squared[0], 1 / len(points))
    for _ in range(MOST_STEPS):
        inverse = distances_to_mean(squared, shares).reciprocal()
        previous, shares = shares, inverse / inverse.sum()
        if (shares - previous).abs().sum() < TOLERANCE:
            break
    return shares


def distances_to_mean(squared: Tensor, shares: Tensor) -> Tensor:
    """From shares @ points to each point, by the points' squared distances (n, n)."""
    towards = squared @ shares
    return (towards - shares @ towards / 2).clamp(min=torch.finfo(squared.dtype).tiny).sqrt()


def is_median(squared: Tensor, index: int) -> bool:
    """Whether the sum of distances is least at one of the points and nowhere else."""
    away = squared[index] > 0
    here = squared[index][away]
    inner = (here[:, None] + here[None] - squared[away][:, away]) / 2
    unit = here.rsqrt()
    pull = (unit @ inner @ unit).clamp(min=0).sqrt()
    return float(pull) < int((~away).sum()) - TIE
