"""Rank rules: the chosen ranks, and rules that are rejected."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diffusion.algebra.svd.rank_selection import select_rank
from lora_diffusion.config.combine import RankRule
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError


def smallest_rank(values: list[int], way: str, goal: Fraction) -> int:
    """Compute the rank by definition, in exact fractions; the Frobenius criterion is compared squared."""
    power = 1 if way == "cumulative" else 2
    needed = (goal**2 if way == "frobenius" else goal) * sum(v**power for v in values)
    return next(k for k in range(1, len(values) + 1) if sum(v**power for v in values[:k]) >= needed)


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8).map(lambda x: sorted(x, reverse=True)),
    st.sampled_from(["keep", "frobenius", "cumulative"]),
    st.integers(1, 64).map(lambda x: Fraction(x, 64)),
)
def test_fraction_criteria_choose_the_smallest_rank(values: list[int], way: str, goal: Fraction) -> None:
    rule = RankRule(**{way: float(goal)})
    assert select_rank(rule, torch.tensor(values, dtype=torch.float32)) == smallest_rank(values, way, goal)


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ({"rank": 3}, [5, 4, 3, 2], 3),
        ({"rank": 9}, [5, 4, 3, 2], 4),
        ({"rank": 9}, [5, 4, 1e-7, 0], 2),
        ({"ratio": 10}, [10, 5, 1, 0.99], 3),
        ({"ratio": 1}, [2, 2, 1], 2),
        ({"ratio": 1e9}, [1, 0.5, 1e-8], 2),
        ({"frobenius": 0.8}, [4, 3], 1),
        ({"frobenius": 0.81}, [4, 3], 2),
        ({"keep": 1}, [3, 2, 1, 0, 0], 3),
        ({"cumulative": 1}, [3, 2, 1, 0, 0], 3),
        ({"keep": 1, "at_most": 2}, [3, 2, 1], 2),
        ({"keep": 0.5}, [0, 0], 1),
        ({"ratio": 10}, [0, 0], 1),
    ],
)
def test_select_rank_examples(rule: dict[str, Any], values: list[float], expected: int) -> None:
    assert select_rank(RankRule(**rule), torch.tensor(values, dtype=torch.float32)) == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "exactly one of rank, keep, ratio, frobenius, cumulative, threshold and quantile, not by none"),
        ({"at_most": 4}, "not by none"),
        ({"rank": 4, "keep": 0.9}, "not by rank and keep"),
        ({"rank": 0}, "'rank' is 0: input should be greater than 0"),
        ({"rank": 2, "at_most": 0}, "'at_most' is 0"),
        ({"keep": 0.0}, "'keep' is 0.0: input should be greater than 0"),
        ({"frobenius": 1.01}, "'frobenius' is 1.01: input should be less than or equal to 1"),
        ({"cumulative": math.nan}, "'cumulative' is nan"),
        ({"ratio": 0.5}, "'ratio' is 0.5: input should be greater than or equal to 1"),
        ({"ratio": math.inf}, "'ratio' is inf"),
    ],
)
def test_invalid_rank_rules_are_rejected(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RankRule, rule, source="test")
