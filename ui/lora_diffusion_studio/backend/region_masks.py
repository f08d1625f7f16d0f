"""Region masks: images, painted by users, of the area in which an adapter is applied."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot, with_options

MASK_PX = 512
"""Side of the canvas and of the mask."""


def save_mask(studio: Studio, painted: Image.Image) -> Path:
    """Save a mask that is white where the canvas is painted. Equal masks share a file.

    Raises:
        ConfigError: If nothing is painted.
    """
    alpha = painted.convert("RGBA").getchannel("A").resize((MASK_PX, MASK_PX))
    mask = alpha.point([255 * (value > 127) for value in range(256)])
    if mask.getextrema() == (0, 0):
        raise ConfigError("the mask is empty; paint the area where the adapter is applied")
    path = studio.config.masks / f"{hashlib.sha256(mask.tobytes()).hexdigest()[:16]}.png"
    with atomic_file(path) as part:
        mask.save(part, format="PNG")
    return path


def set_region(slots: Sequence[AdapterSlot], name: str, mask: Path | None) -> list[AdapterSlot]:
    """Return the slots with one adapter restricted to a mask, or applied everywhere if `mask` is None.

    Raises:
        ConfigError: If no slot has this adapter.
    """
    if name not in [slot.name for slot in slots]:
        raise ConfigError("choose an adapter of the blend")
    region = {"box": "", "mask": str(mask.resolve()) if mask else "", "feather": ""}
    return [with_options(slot, **region) if slot.name == name else replace(slot) for slot in slots]
