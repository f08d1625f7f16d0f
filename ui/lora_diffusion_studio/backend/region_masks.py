"""Masks that visitors paint: where in the picture an adapter acts."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot, with_options

SIDE_PX = 512
NOWHERE: dict[str, str] = {"box": "", "mask": "", "feather": ""}


def save_mask(studio: Studio, painted: Image.Image) -> Path:
    """Save a painted mask, white where painted; equal masks share a file. Raises ConfigError for an empty one."""
    alpha = painted.convert("RGBA").getchannel("A").resize((SIDE_PX, SIDE_PX))
    mask = alpha.point([255 * (value > 127) for value in range(256)])
    if mask.getextrema() == (0, 0):
        raise ConfigError("nothing is painted; paint where the adapter acts")
    path = studio.places.masks / f"{hashlib.sha256(mask.tobytes()).hexdigest()[:16]}.png"
    with atomic_file(path) as part:
        mask.save(part, format="PNG")
    return path


def set_region(rows: Sequence[AdapterSlot], name: str, mask: Path | None) -> list[AdapterSlot]:
    """Return the slots with one adapter restricted to a mask, or unrestricted. Raises ConfigError."""
    if name not in [row.name for row in rows]:
        raise ConfigError("choose an adapter that is on the table")
    where = {**NOWHERE, "mask": str(mask.resolve()) if mask else ""}
    return [with_options(row, **where) if row.name == name else replace(row) for row in rows]
