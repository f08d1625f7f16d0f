"""Settings of a merged checkpoint."""

from typing import Annotated, Literal

from pydantic import Field

from lora_diffusion.config.settings import Settings

WeightType = Literal["keep", "float32", "float16", "bfloat16"]


class MergeConfig(Settings):
    """How a merged checkpoint is written."""

    precision: WeightType = "keep"
    """Type of the written weights; `keep` writes what the base has."""
    shard_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest weight file of a folder in units of 10^9 bytes; as the base's if left out."""
    stochastic_seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """Seed for rounding to 16 bits at random, right in the mean; to the nearest if left out."""
    allow_overflow: bool = False
    """Write values beyond the range of the type as its largest ones, instead of refusing them."""
