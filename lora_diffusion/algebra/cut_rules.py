"""How many singular values to keep by a line that they must reach: an absolute one, or a quantile of their own."""

import math
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from lora_diffusion.algebra.rank_rules import RankRule, count
from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CutRule:
    """Exactly one line, and a cap if wanted.

    Raises ConfigError for none or both, or a value out of range.
    """

    threshold: float | None = None
    """Values of at least this, in units of the weights."""
    quantile: float | None = None
    """Values above this quantile of the module's own ones, 0.9 for the highest tenth."""
    at_most: int | None = None
    """No more than this, whatever the rule says."""

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise ConfigError("values are cut off by exactly one of threshold and quantile; give one of them")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ConfigError(f"threshold is {self.threshold:g}; expected a number above 0, such as 0.01")
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise ConfigError(f"quantile is {self.quantile:g}; expected a number from 0 to below 1, such as 0.9")
        if self.at_most is not None and self.at_most < 1:
            raise ConfigError(f"at most is {self.at_most}; expected a whole number of at least 1")

    def __str__(self) -> str:
        """As people say it: `threshold 0.01, at most 32`."""
        line = f"quantile {self.quantile:g}" if self.threshold is None else f"threshold {self.threshold:g}"
        return line if self.at_most is None else f"{line}, at most {self.at_most}"


Rule: TypeAlias = RankRule | CutRule


def rank_by(rule: Rule, values: Tensor) -> int:
    """How many of the singular values (k,), falling, a rule keeps: at least 1, and none that is numerically zero."""
    if isinstance(rule, RankRule):
        return count(rule, values)
    wanted = RankRule(rank=max(1, above(rule, values)), at_most=rule.at_most)
    return count(wanted, values)


def above(rule: CutRule, values: Tensor) -> int:
    """How many values reach the line; values that are numerically zero have no part in a quantile."""
    if rule.threshold is not None:
        return int((values.double() >= rule.threshold).sum())
    assert rule.quantile is not None
    significant = values[: count(RankRule(rank=values.numel()), values)].double()
    return int((significant > significant.quantile(rule.quantile)).sum())
