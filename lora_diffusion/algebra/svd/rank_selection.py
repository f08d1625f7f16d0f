"""Rules that choose how many singular values to keep: a fixed rank, or the smallest rank that meets a criterion."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_diffusion.config.combine import RankRule

_RELATIVE_TOLERANCE = 1e-15
"""A criterion counts as met if it is missed by a few float64 roundings: 4 of the values (4, 3) is 0.8 of the norm 5."""


def select_rank(rule: RankRule, values: Tensor) -> int:
    """Return how many singular values a rule keeps.

    Values up to largest * epsilon * k are numerically zero and never kept, so a fixed rank above the numerical rank
    gives the numerical rank.

    Args:
        rule: The rank rule.
        values: Singular values (k,) in descending order.

    Returns:
        A rank of at least 1.
    """
    significant = values[values > values[0] * torch.finfo(values.dtype).eps * values.numel()].double()
    limits = [significant.numel(), rule.at_most or significant.numel(), _unlimited_rank(rule, significant)]
    return max(1, min(limits))


def _unlimited_rank(rule: RankRule, values: Tensor) -> int:
    """Return the rank by the criterion alone, for float64 values without numerical zeros; 0 for no values."""
    (name,) = rule.criteria
    return _RANK_BY_CRITERION[name](values, getattr(rule, name)) if values.numel() else 0


def _shortest_prefix(cumulative: Tensor, fraction: float) -> int:
    """Return the length of the shortest prefix that holds a fraction of the total, from cumulative sums or norms."""
    return int((cumulative < fraction * cumulative[-1] * (1 - _RELATIVE_TOLERANCE)).sum()) + 1


_RANK_BY_CRITERION: dict[str, Callable[[Tensor, float], int]] = {
    "rank": lambda _, rank: int(rank),
    "keep": lambda values, fraction: _shortest_prefix(values.square().cumsum(0), fraction),
    "ratio": lambda values, ratio: int((values >= values[0] / ratio).sum()),
    "frobenius": lambda values, fraction: _shortest_prefix(values.square().cumsum(0).sqrt(), fraction),
    "cumulative": lambda values, fraction: _shortest_prefix(values.cumsum(0), fraction),
    "threshold": lambda values, threshold: int((values >= threshold).sum()),
    "quantile": lambda values, quantile: int((values > values.quantile(quantile)).sum()),
}
