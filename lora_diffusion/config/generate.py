"""Settings of a picture."""

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from lora_diffusion.config.settings import Positive, Settings

Scheduler = Literal["base", "ddim", "euler", "euler-ancestral", "dpm++"]

SHORT_NAMES = {"guidance_scale": "guidance", "num_inference_steps": "steps"}
"""Short names of settings: flags, and keys of files that earlier versions wrote."""


class GenerateConfig(Settings):
    """What picture to make. The same settings, base and blend give the same pixels on the same machine."""

    prompt: str
    """What the picture shows."""
    negative_prompt: str = ""
    """What it should not show."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the first picture; each further one adds 1."""
    variation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the starting noise moves from the seed's to the variation seed's: 0 not at all, 1 all the way."""
    variation_seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of a variation; each further picture adds 1 to this one, and the seed stays."""
    num_inference_steps: Annotated[Positive, Field(validation_alias=AliasChoices("num_inference_steps", "steps"))] = 20
    """Denoising steps."""
    guidance_scale: Annotated[
        float, Field(ge=0, allow_inf_nan=False, validation_alias=AliasChoices("guidance_scale", "guidance"))
    ] = 4.0
    """Classifier-free guidance scale; 1 and below turn guidance off."""
    width: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Width in pixels."""
    height: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Height in pixels."""
    scheduler: Scheduler = "base"
    """Sampler; `base` is the one that the base brings."""
    count: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Number of pictures."""

    @model_validator(mode="after")
    def check_unused_settings(self) -> Self:
        """Refuse a variation seed without a variation."""
        if self.variation_seed and not self.variation:
            raise ValueError("variation_seed does nothing at a variation of 0; set variation, e.g. to 0.2")
        return self
