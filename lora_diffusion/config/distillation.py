"""The settings of a distillation, declared once: flags, help, validation and the record in the file come from here.

Apart from what does the work, as help is to come at once and that imports torch.
"""

from typing import Annotated, Literal

from pydantic import Field

from lora_diffusion.config.generate import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS
from lora_diffusion.config.settings import Positive, Settings


class DistillConfig(Settings):
    """One distillation of a blend into one adapter; see `training/distillation/distill.py`."""

    rank: Positive = 8
    """Rank of the adapter, at each module at most that of the blend's sum there."""
    steps: Positive = 200
    """Optimizer steps."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    """Learning rate of the factors at the first step (Adam); it falls to 0 by a cosine."""
    batch_size: Positive = 8
    """Predictions to imitate in each step."""
    most_prompts: Annotated[int, Field(ge=2)] = 24
    """Prompts used at most, drawn from those given; a quarter is held out to measure with."""
    runs: Positive = 2
    """Sampling runs of the blend for each prompt, each from noise of its own."""
    num_inference_steps: Positive = DEFAULT_NUM_INFERENCE_STEPS
    """Denoising steps of a run (DDIM); a mode that goes by steps is imitated for runs of this length."""
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEFAULT_GUIDANCE_SCALE
    """Classifier-free guidance of the runs; above 1, the predictions for the empty prompt are imitated too."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Side of the square pictures of the runs."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Type of the base, which is frozen; factors learn in float32 always."""
    save_precision: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type of the saved factors, which are measured as they are saved."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the prompts' choice, the runs' noise and the order of learning."""
