"""Draw images in a labeled grid, such as one column for each blend and one row for each prompt."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lora_diffusion.core.atomic_files import atomic_file

_BACKGROUND, _HEADING_COLOR, _LABEL_COLOR = (250, 250, 248), (30, 32, 40), (110, 114, 124)
MARGIN_PX, HEADER_PX, LABEL_PX = 10, 44, 190
"""Gap around cells, height of the column headings and width of the row labels, in pixels."""


def draw_image_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    labels: Sequence[str],
    cell_px: int = 192,
) -> Image.Image:
    """Draw images in a grid with a heading above each column and a label to the left of each row.

    Each image is scaled to fill its cell. Small images are enlarged without smoothing.

    Args:
        rows: The images of each row.
        columns: The headings of the columns.
        labels: The labels of the rows.
        cell_px: Width and height of a cell in pixels.
    """
    width = LABEL_PX + len(columns) * (cell_px + MARGIN_PX) + MARGIN_PX
    height = HEADER_PX + len(rows) * (cell_px + MARGIN_PX)
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    heading, text = ImageFont.load_default(18), ImageFont.load_default(16)
    for x, title in enumerate(columns):
        center = LABEL_PX + x * (cell_px + MARGIN_PX) + cell_px // 2
        draw.text((center, HEADER_PX // 2), title, fill=_HEADING_COLOR, font=heading, anchor="mm")
    for y, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        top = HEADER_PX + y * (cell_px + MARGIN_PX)
        wrapped = textwrap.fill(label, 21)
        draw.multiline_text(
            (MARGIN_PX, top + cell_px // 2), wrapped, fill=_LABEL_COLOR, font=text, anchor="lm", spacing=5
        )
        for x, picture in enumerate(pictures):
            small = max(picture.size) <= cell_px
            method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            sheet.paste(
                ImageOps.pad(picture, (cell_px, cell_px), method, _BACKGROUND),
                (LABEL_PX + x * (cell_px + MARGIN_PX), top),
            )
    return sheet


def save_grid(sheet: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an image as a PNG file, atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    with atomic_file(Path(path)) as part:
        sheet.save(part, format="PNG", optimize=True)
