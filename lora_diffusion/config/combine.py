"""Settings of combining adapters into one: how ranks are chosen, consensus methods, and the written file."""

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from lora_diffusion.config.merge import WeightType
from lora_diffusion.config.settings import IgnoredKeys, Positive, Settings

Fraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class RankRule(Settings):
    """A rule that chooses the rank of each module: exactly one criterion, and optionally an upper limit."""

    rank: Positive | None = None
    """Fixed rank for all modules; lower where the delta itself has a lower rank."""
    keep: Fraction | None = None
    """Lowest rank that keeps this fraction of the delta's squared Frobenius norm, such as 0.99."""
    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Keep singular values of at least the module's largest one divided by this number, such as 10."""
    frobenius: Fraction | None = None
    """Lowest rank that keeps this fraction of the delta's Frobenius norm (not squared), such as 0.9."""
    cumulative: Fraction | None = None
    """Lowest rank that keeps this fraction of the sum of singular values, such as 0.9."""
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Keep singular values of at least this number, in the scale of the weights, such as 0.01."""
    quantile: BelowOne | None = None
    """Keep singular values above this quantile of the module's own; 0.9 keeps the highest tenth."""
    at_most: Positive | None = None
    """Upper limit of the rank, whatever the criterion gives."""

    @model_validator(mode="after")
    def check_one_criterion(self) -> Self:
        """Refuse no criterion, or several."""
        if len(self.criteria) != 1:
            given = " and ".join(self.criteria) or "none"
            *others, last = RANK_CRITERIA
            raise ValueError(f"choose the rank by exactly one of {', '.join(others)} and {last}, not by {given}")
        return self

    @property
    def criteria(self) -> tuple[str, ...]:
        """Names of the criteria that are set."""
        return tuple(name for name in RANK_CRITERIA if getattr(self, name) is not None)

    def __str__(self) -> str:
        """Format the rule for people: `keep 0.99, at most 32`."""
        (name,) = self.criteria
        limit = "" if self.at_most is None else f", at most {self.at_most}"
        return f"{name} {getattr(self, name):g}{limit}"


RANK_CRITERIA = tuple(name for name in RankRule.model_fields if name != "at_most")
"""Names of the criteria of a rank rule."""

ConsensusMethod = Literal["ties", "dare", "della", "knots", "magnitude", "median", "slerp", "ziplora", "np-lora"]
"""Names of the consensus methods."""
Disjoint = Literal["mean", "sum"]
"""How TIES merges the entries that agree in sign: by their mean or their sum."""

FORMER_METHOD_NAMES = {"zip": "ziplora"}
"""Names of methods in version 0.1.0, which are still read."""
METHODS_BY_SETTING: dict[str, tuple[ConsensusMethod, ...]] = {
    "density": ("ties", "dare", "della", "knots", "magnitude"),
    "seed": ("dare", "della"),
    "spread": ("della",),
    "disjoint": ("ties", "della", "knots"),
    "penalty": ("ziplora",),
    "projection_strength": ("np-lora",),
}
"""The methods that use each setting."""


def _rename_method(value: object) -> object:
    return FORMER_METHOD_NAMES.get(value, value) if isinstance(value, str) else value


class ConsensusConfig(Settings):
    """A consensus method, which resolves conflicts between adapters instead of adding them up, and its settings."""

    method: Annotated[ConsensusMethod, BeforeValidator(_rename_method)]
    """Consensus method that resolves conflicts between the adapters, instead of the plain weighted sum. slerp and
    ziplora take exactly two adapters; np-lora removes the other adapters' main directions from the first."""
    density: Fraction = 0.5
    """Fraction of entries to keep, above 0 and at most 1 (ties, dare, della, knots, magnitude)."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed for dropping entries at random (dare, della)."""
    spread: BelowOne = 0.2
    """How much more often small entries are dropped than large ones, from 0 (equally often) to below 1 (della)."""
    disjoint: Disjoint = "mean"
    """How entries that agree in sign are merged: `mean` (the strength of one adapter) or `sum` (ties, della, knots)."""
    penalty: BelowOne = 0.9
    """How strongly overlapping columns are reduced, from 0 (plain sum) to below 1 (ziplora)."""
    projection_strength: Annotated[
        float, Field(ge=0, allow_inf_nan=False, validation_alias=AliasChoices("projection_strength", "strength"))
    ] = 1.0
    """How much of the other adapters' main directions is removed: 0 nothing, 1 half, large values all (np-lora)."""

    @model_validator(mode="after")
    def check_unused_settings(self) -> Self:
        """Refuse settings that the method does not use."""
        for name, methods in METHODS_BY_SETTING.items():
            if self.method not in methods and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is a setting of {', '.join(methods)}; the method {self.method} does not use it"
                )
        return self


class CombineConfig(Settings):
    """Settings of combining adapters into one."""

    rule: RankRule | None = None
    """Rule that chooses the rank of each module; without one the sum is exact, and ranks add up."""
    first: Positive | None = None
    """Keep only the first N directions of each module, without an SVD: for adapters trained by DyLoRA, whose
    directions are ordered."""
    consensus: ConsensusConfig | None = None
    """Consensus method to combine by; without one the adapters are summed."""
    base: str = ""
    """Base model of the adapters (folder, single file or hub id); needed for DoRA, whose delta depends on it."""
    dtype: WeightType = "keep"
    """Dtype of the written layers; `keep` is that of the inputs, or float32 if they differ."""
    force: bool = False
    """Replace an existing output file."""
    ignore_unmatched: IgnoredKeys = ()
