"""How many singular values to keep: a rank, or the fewest that meet a goal."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lora_diffusion.errors import ConfigError

ROUNDING = 1e-15
"""How far below a goal still meets it: a few roundings of float64, so that 4 of the values 4 and 3 is 0.8 of 5."""


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """Exactly one way to choose a rank, and a cap if wanted.

    Raises ConfigError for none or several ways, or a value out of range.
    """

    rank: int | None = None
    """So many values."""
    keep: float | None = None
    """The fewest whose squares come to this share of all squares: of the squared Frobenius norm."""
    ratio: float | None = None
    """Those of at least the largest value / ratio."""
    frobenius: float | None = None
    """The fewest that hold this share of the Frobenius norm itself, not squared."""
    cumulative: float | None = None
    """The fewest that come to this share of the sum of all values."""
    threshold: float | None = None
    """Those of at least this, in units of the weights."""
    quantile: float | None = None
    """Those above this quantile of the module's own ones, 0.9 for the highest tenth."""
    at_most: int | None = None
    """No more than this, whatever the rule says."""

    def __post_init__(self) -> None:
        if len(self.criteria) != 1:
            given = " and ".join(self.criteria) or "none"
            *others, last = WAYS
            raise ConfigError(f"a rank is chosen by exactly one of {', '.join(others)} and {last}, not by {given}")
        for name in ("rank", "at_most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{format_criterion(name)} is {value}; expected a whole number of at least 1")
        for name in ("keep", "frobenius", "cumulative"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(
                    f"{format_criterion(name)} is {value:g}; expected a share above 0 and up to 1, such as 0.99"
                )
        if self.ratio is not None and not 1 <= self.ratio < math.inf:
            raise ConfigError(f"ratio is {self.ratio:g}; expected a number of at least 1, such as 10")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ConfigError(f"threshold is {self.threshold:g}; expected a number above 0, such as 0.01")
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise ConfigError(f"quantile is {self.quantile:g}; expected a number from 0 to below 1, such as 0.9")

    @property
    def criteria(self) -> tuple[str, ...]:
        """The names of the ways that are given."""
        return tuple(name for name in WAYS if getattr(self, name) is not None)

    def __str__(self) -> str:
        """As people say it: `keep 0.99, at most 32`."""
        (way,) = self.criteria
        cap = "" if self.at_most is None else f", at most {self.at_most}"
        return f"{way} {getattr(self, way):g}{cap}"


WAYS = tuple(field.name for field in fields(RankRule) if field.name != "at_most")
"""The names of the ways to choose a rank."""


def select_rank(rule: RankRule, values: Tensor) -> int:
    """How many of the singular values (k,), falling, the rule keeps: at least 1, and none that is numerically zero.

    Those are the values up to the largest * epsilon * k. A rank above the number of the others gives that number.
    """
    significant = values[values > values[0] * torch.finfo(values.dtype).eps * values.numel()].double()
    caps = [significant.numel(), rule.at_most or significant.numel(), uncapped_rank(rule, significant)]
    return max(1, min(caps))


def uncapped_rank(rule: RankRule, values: Tensor) -> int:
    """The same without a cap, for values that all count, float64; 0 for no values."""
    (way,) = rule.criteria
    return COUNTS[way](values, getattr(rule, way)) if values.numel() else 0


def shortest_prefix(held: Tensor, share: float) -> int:
    """The length of the shortest prefix that holds a share of the whole; `held` is what each prefix holds."""
    return int((held < share * held[-1] * (1 - ROUNDING)).sum()) + 1


COUNTS: dict[str, Callable[[Tensor, float], int]] = {
    "rank": lambda _, rank: int(rank),
    "keep": lambda values, share: shortest_prefix(values.square().cumsum(0), share),
    "ratio": lambda values, ratio: int((values >= values[0] / ratio).sum()),
    "frobenius": lambda values, share: shortest_prefix(values.square().cumsum(0).sqrt(), share),
    "cumulative": lambda values, share: shortest_prefix(values.cumsum(0), share),
    "threshold": lambda values, line: int((values >= line).sum()),
    "quantile": lambda values, share: int((values > values.quantile(share)).sum()),
}
"""What each way keeps of falling values."""


def format_criterion(name: str) -> str:
    return name.replace("_", " ")
