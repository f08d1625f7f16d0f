"""Settings of the training of gates."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.config.settings import EMBEDDED_BASE, Finite, Positive, Settings


class RouteConfig(Settings):
    """One training of gates over frozen adapters, as read from a TOML file; see `training/routing/train.py`."""

    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Folder with captioned pictures, or several, taken together; one that is given twice counts twice."""
    output: Path
    """The blend preset to write (.json)."""
    base: str = EMBEDDED_BASE
    """Base to train on: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    adapters: Annotated[tuple[BlendEntry, ...], Field(min_length=1)]
    """The adapters, each with `path` and, if it is not 1, `weight`, a plain number that its gates multiply."""
    num_time_bins: Positive = 4
    """Number of equal time bins of the denoising steps, each with its own gates."""
    steps: Positive = 100
    """Optimizer steps."""
    batch_size: Positive = 4
    """Pictures per step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    """Learning rate of the gates at the first step (Adam); it falls to 0 by a cosine."""
    init_value: Finite | Literal["average"] = "average"
    """Initial value of every gate: `average` is 1 / number of adapters, as several at full strength are more than a
    base can take; 1 is the plain sum, for weights that are tuned already."""
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """How strongly gates are held to their start: times their mean squared distance from it, added to the loss."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Pictures are scaled and center-cropped to this square."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Type of the frozen base; gates are float32 always."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of data order and noise."""

    @field_validator("data", mode="before")
    @classmethod
    def accept_one_folder(cls, value: object) -> object:
        """Accept a single folder as a list of one."""
        return (value,) if isinstance(value, str | Path) else value
