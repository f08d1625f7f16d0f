"""A labeled grid of pictures: columns are blends, rows are prompts."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from lora_diffusion.core.atomic_files import atomic_file

GROUND, INK, PALE = (250, 250, 248), (30, 32, 40), (110, 114, 124)
MARGIN_PX, HEADER_PX, LABEL_PX = 10, 44, 190


def draw_image_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    columns: Sequence[str],
    labels: Sequence[str],
    cell_px: int = 192,
) -> Image.Image:
    """Pictures side by side, each as large as a cell holds, with headings over columns and labels before rows.

    Small ones are enlarged without smoothing, so that their pixels are seen.
    """
    width = LABEL_PX + len(columns) * (cell_px + MARGIN_PX) + MARGIN_PX
    height = HEADER_PX + len(rows) * (cell_px + MARGIN_PX)
    sheet = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(sheet)
    heading, text = ImageFont.load_default(18), ImageFont.load_default(16)
    for x, title in enumerate(columns):
        center = LABEL_PX + x * (cell_px + MARGIN_PX) + cell_px // 2
        draw.text((center, HEADER_PX // 2), title, fill=INK, font=heading, anchor="mm")
    for y, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        top = HEADER_PX + y * (cell_px + MARGIN_PX)
        wrapped = textwrap.fill(label, 21)
        draw.multiline_text((MARGIN_PX, top + cell_px // 2), wrapped, fill=PALE, font=text, anchor="lm", spacing=5)
        for x, picture in enumerate(pictures):
            small = max(picture.size) <= cell_px
            method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            sheet.paste(
                ImageOps.pad(picture, (cell_px, cell_px), method, GROUND), (LABEL_PX + x * (cell_px + MARGIN_PX), top)
            )
    return sheet


def save_grid(sheet: Image.Image, path: Path) -> None:
    """Write as PNG, whole or not at all."""
    with atomic_file(path) as part:
        sheet.save(part, format="PNG", optimize=True)
