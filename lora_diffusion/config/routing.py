"""Settings of training gates over adapters."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.config.settings import EMBEDDED_BASE, BaseName, Finite, Positive, Settings


class RouteConfig(Settings):
    """Settings of training gates over frozen adapters."""

    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Folder of captioned images, or a list of folders; a folder that is listed twice counts twice."""
    output: Path
    """Blend preset to write (.json)."""
    base: BaseName = EMBEDDED_BASE
    adapters: Annotated[tuple[BlendEntry, ...], Field(min_length=1)]
    """Adapters, each with `path` and optionally `weight` (a number, default 1), which the gates multiply."""
    num_time_bins: Positive = 4
    """Number of equal parts of the denoising steps, each with its own gates."""
    steps: Positive = 100
    """Number of optimizer steps."""
    batch_size: Positive = 4
    """Images per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    """Learning rate of the gates at the first step (Adam); it decays to 0 by a cosine."""
    init_value: Finite | Literal["average"] = "average"
    """Initial value of every gate: `average` is 1 / number of adapters, because several adapters at full strength often
    overdrive the base; 1 is the plain sum, for weights that are tuned already."""
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the mean squared distance of the gates from their initial value, which is added to the loss."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Size in pixels of the square to which images are scaled and center-cropped; the base's native one by default."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the frozen base; the gates are trained in float32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed for data order and noise."""

    @field_validator("data", mode="before")
    @classmethod
    def accept_one_folder(cls, value: object) -> object:
        """Accept a single folder as a list of one."""
        return (value,) if isinstance(value, str | Path) else value
