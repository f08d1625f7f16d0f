"""A blend by reference, as data that travels in JSON, PNGs and headers: adapters, weights, regions, composition."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, ValidationError, model_validator

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.settings import EMBEDDED_BASE, Finite, Positive, Settings, format_validation_error
from lora_diffusion.errors import ConfigError

Curve = Literal["hold", "linear", "cosine"]
Mode = Literal["sum", "switch", "composite", "k-lora", "np-lora"]
Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Settings):
    """How a factor goes over the denoising steps: through points, each a position and the factor there.

    Before the first and after the last point their factors hold. A step's position is its middle, (i + 0.5) / steps,
    in fractions, and its number from 0 in steps.
    """

    points: Annotated[tuple[tuple[Finite, Finite], ...], Field(min_length=1)]
    """(position, factor), by ascending position."""
    unit: Literal["fraction", "step"] = "fraction"
    curve: Curve = "hold"
    """Between points: `hold` the earlier factor, or go over to the later one, `linear` or by a half `cosine`."""

    @model_validator(mode="after")
    def check_ascending(self) -> Self:
        """Refuse points that are not in ascending order."""
        positions = [position for position, _ in self.points]
        if positions != sorted(positions):
            raise ValueError(f"the points of a schedule go back: {positions}; give them by ascending position")
        return self


class BlendWeight(Settings):
    """An adapter's weight in full: what a module gets is the weight of its component, times every factor it meets.

    Whatever is not named keeps the adapter's weight. The text encoders read the prompt once, before the first step, so
    schedules act on the UNet alone.
    """

    value: Finite = 1.0
    """The adapter's weight."""
    components: Mapping[Literal["unet", "text_encoder", "text_encoder_2"], Finite] = {}
    """Weights in its place, by component."""
    blocks: str | tuple[Finite, ...] | Mapping[str, Finite | Schedule] = {}
    """Factors by block: a stock preset's name, a vector of 12, 17, 20 or 26 values, or factors by name (`IN04`)."""
    modules: tuple[tuple[str, Finite], ...] = ()
    """Factors by pattern of module path (`unet.*.attn2.*`); of several that match, the last counts."""
    schedule: Schedule | None = None
    """Factor over the steps."""


Weight = Finite | BlendWeight
"""A number, or an adapter's weight in full."""


class Region(Settings):
    """Where in the picture an adapter acts: a box, or a mask whose white is 1 and black is 0; softened at its edges."""

    box: tuple[Share, Share, Share, Share] | None = None
    """Left, top, right and bottom, as fractions of the picture."""
    mask: str = ""
    """Picture file with the mask."""
    mask_hash: str = ""
    """SHA-256 of that file; empty accepts any."""
    feather: Share = 0.1
    """Width of the soft edge, as a fraction of the picture's sides."""

    @model_validator(mode="after")
    def check_shape(self) -> Self:
        """Refuse a region with both a box and a mask, with neither, or with an empty box."""
        if (self.box is None) == (not self.mask):
            raise ValueError("a region is a box or a mask; give one of them")
        if self.box and (self.box[0] >= self.box[2] or self.box[1] >= self.box[3]):
            raise ValueError(
                f"the box {self.box} is empty; give left, top, right, bottom with left < right, top < bottom"
            )
        return self


MODE_OF = {"switch_every": "switch", "k_lora_slope": "k-lora", "k_lora_start": "k-lora", "projection": "np-lora"}
"""Settings of a composition that one mode alone has a use for."""


class Composition(Settings):
    """How the adapters of a blend come together."""

    mode: Mode = "sum"
    """All at once, in turn, the mean of their predictions, the stronger one, or the first without the others' part."""
    switch_every: Positive = 5
    """Denoising steps before `switch` takes the next adapter."""
    k_lora_slope: Finite = 1.5
    """How much more the second adapter counts at the last step than at the first."""
    k_lora_start: Finite = 0.5
    """How much the second adapter counts at the first step."""
    projection: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """How strongly `np-lora` takes the others' directions out: 0 not at all, 1 half, large values in full."""
    parallel: Annotated[bool, Field(validation_alias=AliasChoices("parallel", "exact"))] = False
    """Apply the blend in parallel to the weights instead of adding to them, which half precision may round away."""

    @model_validator(mode="after")
    def check_unused_settings(self) -> Self:
        """Refuse settings that belong to another mode."""
        for field, mode in MODE_OF.items():
            if self.mode != mode and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} belongs to the mode {mode}; {self.mode} has no use for it")
        return self


class BlendEntry(Settings):
    """One adapter of a preset, by reference."""

    path: str
    """Where the file was found; a relative path is taken from the preset's folder."""
    weight: Weight = 1.0
    name: str = ""
    hash: str = ""
    """Content hash over the adapter's tensors; empty accepts any file."""
    payload_hash: str = ""
    """SHA-256 of the file's bytes after its header, by which A1111 and Forge know it."""
    region: Region | None = None
    """The part of the picture that it acts in; everywhere if not given."""


class BaseTerm(Settings):
    """Another checkpoint blended into the base: weight * (added - taken)."""

    added: str
    """`tiny-sd`, a folder in diffusers' layout, a single file, or a hub id."""
    weight: Annotated[float, Field(allow_inf_nan=False)]
    taken: str = ""
    """What is subtracted from it; the base itself if empty, which makes a weighted sum of the two."""
    added_hash: str = ""
    taken_hash: str = ""


class BlendPreset(Settings):
    """A blend by reference, with the settings to sample it; travels as JSON."""

    name: str
    description: str = ""
    base: str = EMBEDDED_BASE
    adapters: tuple[BlendEntry, ...]
    composition: Composition = Composition()
    settings: GenerateConfig | None = None

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """The preset in a JSON text; raises ConfigError that names `source` and every mistake."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{source}: {format_validation_error(error, cls)}") from None
