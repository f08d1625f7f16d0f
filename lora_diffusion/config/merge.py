"""Settings of merging adapters and checkpoints into a checkpoint."""

from typing import Annotated, Literal

from pydantic import Field

from lora_diffusion.config.settings import Settings

WeightType = Literal["keep", "float32", "float16", "bfloat16"]
"""Dtype of written tensors; `keep` is that of the input."""


class MergeConfig(Settings):
    """Settings of writing a merged checkpoint."""

    precision: WeightType = "keep"
    """Dtype of the written weights; `keep` is that of the base."""
    shard_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest size of a weight file in a folder, in GB (10^9 bytes); like the base's files by default."""
    stochastic_seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """Seed for stochastic rounding to 16 bits, which is exact on average; without it, values round to nearest."""
    allow_overflow: bool = False
    """Clamp values beyond the range of the dtype to its largest number, instead of reporting an error."""
