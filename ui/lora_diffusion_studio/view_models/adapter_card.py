"""An adapter as it is offered: what a visitor reads of it and sees, before it is on the table."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lora_diffusion.architectures.families import family_title
from lora_diffusion.errors import LoRADiffusionError
from lora_diffusion.library.entry import LibraryEntry
from lora_diffusion.workflows.adapters.inspect import inspect_adapter
from lora_diffusion_studio.view_models.adapter_slot import LEAST, MOST

FACE_PX = 192
GROUNDS = ("#7c3aed", "#0e7490", "#b45309", "#be185d", "#4d7c0f", "#1d4ed8", "#9f1239", "#334155")
"""Of cards without a picture; white is readable on each."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """An adapter on offer."""

    name: str
    """Its path inside the library."""
    title: str
    triggers: tuple[str, ...]
    kinds: tuple[str, ...]
    about: str
    """Kind, rank and family in one line."""
    preview: Path | None
    preferred: float
    range: tuple[float, float]
    """Ends of its weight slider."""


def make_card(entry: LibraryEntry) -> Card:
    ranks = describe_ranks(str(entry.path), entry.stamp)
    about = ", ".join(filter(None, (" and ".join(entry.kinds), ranks, family_title(entry.family), entry.variant)))
    return Card(
        name=entry.relative,
        title=entry.name,
        triggers=(*entry.trigger_words, *entry.learned_tokens),
        kinds=entry.kinds,
        about=about,
        preview=entry.preview,
        preferred=1.0 if entry.preferred_weight is None else entry.preferred_weight,
        range=entry.weight_range or (LEAST, MOST),
    )


@lru_cache(maxsize=4096)
def describe_ranks(path: str, stamp: str) -> str:  # noqa: ARG001 (a changed file is a new key)
    """Return `rank 8`, or a range; empty for a file without ranks, or an unreadable one."""
    try:
        spread = inspect_adapter(Path(path))["ranks"]
    except LoRADiffusionError:
        return ""
    if not spread:
        return ""
    least, most = spread["min"], spread["max"]
    return f"rank {least}" if least == most else f"ranks {least} to {most}"


def make_thumbnail(title: str, picture: Path | None) -> Image.Image:
    """Return the preview picture, cropped to a square; without one, a tile with initials."""
    try:
        stamp = picture.stat().st_mtime_ns if picture else 0
        return load_thumbnail(picture, stamp) if picture else draw_letter_tile(title)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return draw_letter_tile(title)


@lru_cache(maxsize=512)
def load_thumbnail(picture: Path, stamp: int) -> Image.Image:  # noqa: ARG001 (a changed picture is a new key)
    with Image.open(picture) as opened:
        opened.draft("RGB", (FACE_PX, FACE_PX))
        return ImageOps.fit(opened.convert("RGB"), (FACE_PX, FACE_PX))


@lru_cache(maxsize=512)
def draw_letter_tile(title: str) -> Image.Image:
    """Draw a tile with initials in a color derived from the title."""
    ground = GROUNDS[hashlib.sha256(title.encode("utf-8", "replace")).digest()[0] % len(GROUNDS)]
    tile = Image.new("RGB", (FACE_PX, FACE_PX), ground)
    middle = (FACE_PX // 2, FACE_PX // 2)
    ImageDraw.Draw(tile).text(middle, title[:2], fill="white", font=ImageFont.load_default(84), anchor="mm")
    return tile
