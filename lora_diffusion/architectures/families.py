"""The families SD 1.x, SD 2.x and SDXL: names, components, widths, and detection from a base's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_diffusion.errors import BaseModelError

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""Components that an adapter can change."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Base models that can share adapters."""

    name: str
    """Identifier in files and recipes."""
    title: str
    """Name shown to users."""
    components: tuple[str, ...]
    """Components of a base that an adapter can change."""
    cross_attention_dim: int | None
    """Width of the text context; None for the tiny families, whose bases differ in size."""
    text_widths: Mapping[str, int]
    """Width of each text encoder, by component; for the family `tiny-sd`, those of the embedded base."""
    modelspec: str
    """Architecture id of an adapter in ModelSpec 1.0.1."""
    resolution: int
    """Side of the square training pictures, in pixels."""

    @property
    def context_width(self) -> int:
        """Width of the context of the UNet's cross-attention: the sum of the text encoders' widths."""
        return self.cross_attention_dim or sum(self.text_widths.values())


ONE_ENCODER = ("unet", "text_encoder")
TWO_ENCODERS = ("unet", "text_encoder", "text_encoder_2")

SD1 = Family(
    name="sd1",
    title="SD 1.x",
    components=ONE_ENCODER,
    cross_attention_dim=768,
    text_widths={"text_encoder": 768},
    modelspec="stable-diffusion-v1/lora",
    resolution=512,
)
SD2 = Family(
    name="sd2",
    title="SD 2.x",
    components=ONE_ENCODER,
    cross_attention_dim=1024,
    text_widths={"text_encoder": 1024},
    modelspec="stable-diffusion-v2-768-v/lora",
    resolution=768,
)
SDXL = Family(
    name="sdxl",
    title="SDXL",
    components=TWO_ENCODERS,
    cross_attention_dim=2048,
    text_widths={"text_encoder": 768, "text_encoder_2": 1280},
    modelspec="stable-diffusion-xl-v1-base/lora",
    resolution=1024,
)
TINY_SD = Family(
    name="tiny-sd",
    title="tiny SD",
    components=ONE_ENCODER,
    cross_attention_dim=None,
    text_widths={"text_encoder": 128},
    modelspec="tiny-stable-diffusion/lora",
    resolution=64,
)
TINY_SDXL = Family(
    name="tiny-sdxl",
    title="tiny SDXL",
    components=TWO_ENCODERS,
    cross_attention_dim=None,
    text_widths={},
    modelspec="tiny-stable-diffusion-xl/lora",
    resolution=64,
)

FAMILIES = {family.name: family for family in (SD1, SD2, SDXL, TINY_SD, TINY_SDXL)}


def family_title(name: str) -> str:
    """Return the name of a family that is shown to users; an unknown name is returned as it is."""
    return FAMILIES[name].title if name in FAMILIES else name


def detect_family(cross_attention_dim: int, *, two_encoders: bool) -> Family:
    """Detect the family of a base.

    Args:
        cross_attention_dim: Width of the text context in the UNet's configuration.
        two_encoders: Whether the base has two text encoders.

    Returns:
        The family with this width, or else one of the tiny families.

    Raises:
        BaseModelError: If the family with this width has another number of text encoders.
    """
    by_width = {SD1.cross_attention_dim: SD1, SD2.cross_attention_dim: SD2, SDXL.cross_attention_dim: SDXL}
    family = by_width.get(cross_attention_dim, TINY_SDXL if two_encoders else TINY_SD)
    if (family.components == TWO_ENCODERS) != two_encoders:
        count = "two text encoders" if two_encoders else "one text encoder"
        raise BaseModelError(
            f"a UNet with text context of width {cross_attention_dim} is {family.title}, which does not have {count}; "
            f"expected the components {', '.join(family.components)}"
        )
    return family
