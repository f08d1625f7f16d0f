"""Settings of distilling a blend into one adapter."""

from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from lora_diffusion.config.generate import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS
from lora_diffusion.config.settings import Positive, Settings


class DistillConfig(Settings):
    """Settings of distilling a blend into one adapter."""

    rank: Positive = 8
    """Rank of the adapter; at each module at most the rank of the sum of the blend."""
    steps: Positive = 200
    """Number of optimizer steps."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    """Learning rate of the factors at the first step (Adam); it decays to 0 by a cosine."""
    batch_size: Positive = 8
    """Noise predictions per optimizer step."""
    max_prompts: Annotated[int, Field(ge=2, validation_alias=AliasChoices("max_prompts", "most_prompts"))] = 24
    """Maximum number of prompts, chosen at random from those given; a quarter is held out for measuring."""
    runs: Positive = 2
    """Sampling runs of the blend per prompt, each from its own initial noise."""
    num_inference_steps: Positive = DEFAULT_NUM_INFERENCE_STEPS
    """Denoising steps of a sampling run (DDIM); modes such as `switch` are imitated for runs of this length."""
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEFAULT_GUIDANCE_SCALE
    """Classifier-free guidance scale of the sampling runs; above 1, unconditional predictions are imitated too."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Resolution of the sampling runs in pixels; the base's native one by default."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the frozen base; the factors are trained in float32."""
    save_precision: Literal["float32", "float16", "bfloat16"] = "float16"
    """Dtype of the saved factors; errors are measured after rounding to it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed for choosing prompts, initial noise and the order of training."""
