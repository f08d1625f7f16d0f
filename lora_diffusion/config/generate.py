"""Settings for generating images: the image itself, and how the base and the adapters are loaded."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from lora_diffusion.config.settings import EMBEDDED_BASE, BaseName, BaseQuantization, IgnoredKeys, Positive, Settings

Scheduler = Literal["base", "ddim", "euler", "euler-ancestral", "dpm++"]
"""Names of the samplers; `base` is the one that the base's own scheduler configuration names."""

DEFAULT_NUM_INFERENCE_STEPS = 20
"""Denoising steps of an image, in every command and in the studio."""
DEFAULT_GUIDANCE_SCALE = 4.0
"""Classifier-free guidance scale of an image, in every command and in the studio."""

GRID_SETTINGS = (
    "weight",
    "block preset",
    "adapter",
    "mode",
    "seed",
    "steps",
    "guidance",
    "scheduler",
    "prompt",
    "negative_prompt",
)
"""Names of the settings that an image grid can vary."""
SHORT_NAMES = {"guidance_scale": "guidance", "num_inference_steps": "steps"}
"""Short names of settings: flags, and keys of files that version 0.1.0 wrote."""


class GenerateConfig(Settings):
    """Settings of an image. The same settings, base and blend give the same pixels on the same machine."""

    prompt: str
    """Prompt; `(word:1.3)` weights a word, and `<lora:NAME:WEIGHT>` adds an adapter of the library."""
    negative_prompt: str = ""
    """Negative prompt."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the first image; each further image adds 1."""
    variation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Variation strength: how far the initial noise moves from that of the seed (0) to that of the variation seed
    (1)."""
    variation_seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the variation; each further image adds 1 to it, and the seed stays the same."""
    num_inference_steps: Annotated[Positive, Field(validation_alias=AliasChoices("num_inference_steps", "steps"))] = (
        DEFAULT_NUM_INFERENCE_STEPS
    )
    """Number of denoising steps."""
    guidance_scale: Annotated[
        float, Field(ge=0, allow_inf_nan=False, validation_alias=AliasChoices("guidance_scale", "guidance"))
    ] = DEFAULT_GUIDANCE_SCALE
    """Classifier-free guidance scale (CFG); 1 and below turn guidance off."""
    width: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Width in pixels, a multiple of 8; the base's native resolution by default."""
    height: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Height in pixels, a multiple of 8; the base's native resolution by default."""
    scheduler: Scheduler = "base"
    """Sampler; `base` is the one that the base comes with."""
    count: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Number of images."""

    @model_validator(mode="after")
    def check_unused_settings(self) -> Self:
        """Refuse a variation seed without a variation."""
        if self.variation_seed and not self.variation:
            raise ValueError("variation_seed has no effect while variation is 0; set variation, e.g. to 0.2")
        return self


class BaseConfig(Settings):
    """Which base model is loaded, and how."""

    base: BaseName = EMBEDDED_BASE
    quantize: BaseQuantization = "none"


class LoadConfig(Settings):
    """How adapters are found, and how a blend of them is loaded and applied."""

    library: Path | None = None
    """Folder in which adapters are found by name (for `<lora:...>` tags) and by hash."""
    block_presets: Path | None = None
    """File with named block weights for `lbw=NAME`, in the format of LoRA Block Weight's `lbwpresets.txt`."""
    balance: bool = False
    """Scale the weights so that adapters with equal weights have deltas of equal norm."""
    low_memory: bool = False
    """Keep no copy of the original weights in memory; to undo the blend, read them from the base's files again."""
    ignore_unmatched: IgnoredKeys = ()
