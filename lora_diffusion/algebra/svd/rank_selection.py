"""Rules that choose how many singular values to keep: a fixed rank, or the smallest rank that meets a criterion."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError

_RELATIVE_TOLERANCE = 1e-15
"""A criterion counts as met if it is missed by a few float64 roundings: 4 of the values (4, 3) is 0.8 of the norm 5."""


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """A rule that chooses the rank of a layer: exactly one criterion, and optionally an upper limit.

    Raises:
        ConfigError: If no criterion or several are set, or a value is out of range.
    """

    rank: int | None = None
    """Fixed rank."""
    keep: float | None = None
    """The smallest rank that keeps this fraction of the squared Frobenius norm."""
    ratio: float | None = None
    """Keep the singular values of at least the largest one divided by this."""
    frobenius: float | None = None
    """The smallest rank that keeps this fraction of the Frobenius norm, not squared."""
    cumulative: float | None = None
    """The smallest rank that keeps this fraction of the sum of all singular values."""
    threshold: float | None = None
    """Keep the singular values of at least this, an absolute number in the scale of the weights."""
    quantile: float | None = None
    """Keep the singular values above this quantile of the module's values; 0.9 keeps the highest tenth."""
    at_most: int | None = None
    """Upper limit of the rank, whatever the criterion gives."""

    def __post_init__(self) -> None:
        if len(self.criteria) != 1:
            given = " and ".join(self.criteria) or "none"
            *others, last = CRITERIA
            raise ConfigError(f"choose the rank by exactly one of {', '.join(others)} and {last}, not by {given}")
        for name in ("rank", "at_most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{_display_name(name)} is {value}; expected an integer of at least 1")
        for name in ("keep", "frobenius", "cumulative"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(
                    f"{_display_name(name)} is {value:g}; expected a fraction above 0 and at most 1, such as 0.99"
                )
        if self.ratio is not None and not 1 <= self.ratio < math.inf:
            raise ConfigError(f"ratio is {self.ratio:g}; expected a number of at least 1, such as 10")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ConfigError(f"threshold is {self.threshold:g}; expected a number above 0, such as 0.01")
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise ConfigError(f"quantile is {self.quantile:g}; expected a number from 0 to below 1, such as 0.9")

    @property
    def criteria(self) -> tuple[str, ...]:
        """Names of the criteria that are set."""
        return tuple(name for name in CRITERIA if getattr(self, name) is not None)

    def __str__(self) -> str:
        """Format the rule for people: `keep 0.99, at most 32`."""
        (name,) = self.criteria
        limit = "" if self.at_most is None else f", at most {self.at_most}"
        return f"{name} {getattr(self, name):g}{limit}"


CRITERIA = tuple(field.name for field in fields(RankRule) if field.name != "at_most")
"""Names of the criteria of a rank rule."""


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


def _display_name(name: str) -> str:
    return name.replace("_", " ")
