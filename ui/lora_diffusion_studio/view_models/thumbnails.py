"""Square thumbnails of adapters and presets."""

import hashlib
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

THUMBNAIL_PX = 192
TILE_COLORS = ("#7c3aed", "#0e7490", "#b45309", "#be185d", "#4d7c0f", "#1d4ed8", "#9f1239", "#334155")
"""Background colors of tiles. White text is readable on each."""


def make_thumbnail(title: str, image: Path | None) -> Image.Image:
    """Return the image cropped to a square, or a tile with the first letters of the title if it cannot be read."""
    try:
        modified = image.stat().st_mtime_ns if image else 0
        return _load_thumbnail(image, modified) if image else _draw_letter_tile(title)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return _draw_letter_tile(title)


@lru_cache(maxsize=512)
def _load_thumbnail(image: Path, modified: int) -> Image.Image:  # noqa: ARG001 (a changed file is a new cache key)
    with Image.open(image) as opened:
        opened.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
        return ImageOps.fit(opened.convert("RGB"), (THUMBNAIL_PX, THUMBNAIL_PX))


@lru_cache(maxsize=512)
def _draw_letter_tile(title: str) -> Image.Image:
    """Return a tile with the title's first two letters on a color that is derived from the title."""
    color = TILE_COLORS[hashlib.sha256(title.encode("utf-8", "replace")).digest()[0] % len(TILE_COLORS)]
    tile = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX), color)
    center = (THUMBNAIL_PX // 2, THUMBNAIL_PX // 2)
    ImageDraw.Draw(tile).text(center, title[:2], fill="white", font=ImageFont.load_default(84), anchor="mm")
    return tile
