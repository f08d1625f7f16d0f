"""Blends by reference, stored as JSON in presets, images and file headers: adapters, weights, regions, composition."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, ValidationError, model_validator

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.settings import (
    EMBEDDED_BASE,
    BaseName,
    CheckpointName,
    Finite,
    Positive,
    Settings,
    format_validation_error,
)
from lora_diffusion.errors import ConfigError

Curve = Literal["hold", "linear", "cosine"]
"""How a schedule interpolates between its points."""
Mode = Literal["sum", "switch", "composite", "k-lora", "np-lora"]
"""How the adapters of a blend are composed."""
Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Settings):
    """A factor that changes over the denoising steps, given by points of position and factor.

    Before the first point the factor is that of the first point, and after the last that of the last. The position of
    step i (from 0) is (i + 0.5) / num_inference_steps if the unit is `fraction`, and i if it is `step`.
    """

    points: Annotated[tuple[tuple[Finite, Finite], ...], Field(min_length=1)]
    """Pairs (position, factor) in ascending order of position."""
    unit: Literal["fraction", "step"] = "fraction"
    """Unit of the positions: fraction of the run, or step number."""
    curve: Curve = "hold"
    """Interpolation between two points: `hold` the earlier factor, `linear`, or half a `cosine` wave."""

    @model_validator(mode="after")
    def check_ascending(self) -> Self:
        """Refuse points that are not in ascending order."""
        positions = [position for position, _ in self.points]
        if positions != sorted(positions):
            raise ValueError(f"the points of a schedule are not in ascending order: {positions}; sort them by position")
        return self


class BlendWeight(Settings):
    """The weight of an adapter, by component, block, module pattern and denoising step.

    The weight of a module is that of its component, times the factors of its block, of the last pattern that matches
    it, and of the schedule. Schedules act on the UNet only, because the text encoders read the prompt once, before the
    first step.
    """

    value: Finite = 1.0
    """Weight of all components that are not named in `components`."""
    components: Mapping[Literal["unet", "text_encoder", "text_encoder_2"], Finite] = {}
    """Weights by component, instead of `value`."""
    blocks: str | tuple[Finite, ...] | Mapping[str, Finite | Schedule] = {}
    """Factors by block: name of a block preset, vector of 12, 17, 20 or 26 values, or factors by name (`IN04`)."""
    modules: tuple[tuple[str, Finite], ...] = ()
    """Pairs of a module-path pattern (`unet.*.attn2.*`) and a factor; the last matching pattern counts."""
    schedule: Schedule | None = None
    """Factor over the denoising steps; it acts on the UNet only."""


Weight = Finite | BlendWeight
"""A single number, or a weight by component, block, module pattern and step."""


class Region(Settings):
    """The part of the image in which an adapter acts: a box or a mask, with soft edges."""

    box: tuple[Share, Share, Share, Share] | None = None
    """Left, top, right and bottom edge, as fractions of the image's size."""
    mask: str = ""
    """Image file with the mask: the adapter acts where it is white."""
    mask_hash: str = ""
    """SHA-256 of the mask file; empty accepts any file."""
    feather: Share = 0.1
    """Width of the soft edge, as a fraction of the image's size."""

    @model_validator(mode="after")
    def check_shape(self) -> Self:
        """Refuse a region with both a box and a mask, with neither, or with an empty box."""
        if (self.box is None) == (not self.mask):
            raise ValueError("a region needs either a box or a mask; give exactly one of them")
        if self.box and (self.box[0] >= self.box[2] or self.box[1] >= self.box[3]):
            raise ValueError(
                f"the box {self.box} is empty; give left, top, right, bottom with left < right, top < bottom"
            )
        return self


MODE_OF = {
    "switch_every": "switch",
    "k_lora_slope": "k-lora",
    "k_lora_start": "k-lora",
    "projection_strength": "np-lora",
}
"""Settings of a composition that only one mode uses."""


class Composition(Settings):
    """How the adapters of a blend are composed during sampling."""

    mode: Mode = "sum"
    """How adapters are composed: `sum` of the deltas; `switch`, one adapter at a time, in turn; `composite`, the mean
    of one noise prediction per adapter (both arXiv 2402.16843); `k-lora`, at each module the stronger of two adapters
    (arXiv 2502.18461); or `np-lora`, the first adapter without the main directions of the others."""
    switch_every: Positive = 5
    """Denoising steps before `switch` activates the next adapter."""
    k_lora_slope: Finite = 1.5
    """How much the factor of the second adapter in `k-lora`'s comparison grows from the first to the last step."""
    k_lora_start: Finite = 0.5
    """Factor of the second adapter in `k-lora`'s comparison at the first step."""
    projection_strength: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, validation_alias=AliasChoices("projection_strength", "projection")),
    ] = 1.0
    """How much of the other adapters' main directions `np-lora` removes: 0 nothing, 1 half, large values all."""
    parallel: Annotated[bool, Field(validation_alias=AliasChoices("parallel", "exact"))] = False
    """Compute the adapters in parallel to the base's layers instead of adding them to its weights: slower, but small
    deltas are not lost to rounding in half precision."""

    @model_validator(mode="after")
    def check_unused_settings(self) -> Self:
        """Refuse settings that belong to another mode."""
        for field, mode in MODE_OF.items():
            if self.mode != mode and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} is a setting of the mode {mode}; the mode {self.mode} does not use it")
        return self


class BlendEntry(Settings):
    """An adapter of a preset, by reference."""

    path: str
    """Path of the file; relative paths start at the preset's folder."""
    weight: Weight = 1.0
    """Weight of the adapter."""
    name: str = ""
    """Name of the adapter."""
    hash: str = ""
    """Content hash over the adapter's tensors; empty accepts any file."""
    payload_hash: str = ""
    """SHA-256 of the file's bytes after its header, which A1111 and Forge use to identify adapters."""
    region: Region | None = None
    """Part of the image in which the adapter acts; all of it by default."""


class BaseTerm(Settings):
    """A checkpoint merged into the base W: W + weight * (added - taken)."""

    added: CheckpointName
    weight: Annotated[float, Field(allow_inf_nan=False)]
    """Weight of the difference."""
    taken: str = ""
    """Checkpoint that is subtracted; empty for the base itself, which makes a weighted sum."""
    added_hash: str = ""
    """Hash of the weights of `added`; empty accepts any."""
    taken_hash: str = ""
    """Hash of the weights of `taken`; empty accepts any."""


class BlendPreset(Settings):
    """A blend by reference, with base and image settings, stored as JSON."""

    name: str
    """Name of the preset."""
    description: str = ""
    """Description of the preset."""
    base: BaseName = EMBEDDED_BASE
    adapters: tuple[BlendEntry, ...]
    """Adapters of the blend, with weights."""
    composition: Composition = Composition()
    """How the adapters are composed."""
    settings: GenerateConfig | None = None
    """Settings of the image; None if the preset has none."""

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """Read a preset from JSON.

        Args:
            text: The JSON text.
            source: Where the text comes from, for error messages.

        Raises:
            ConfigError: If the text is invalid; the message lists all mistakes.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{source}: {format_validation_error(error, cls)}") from None
