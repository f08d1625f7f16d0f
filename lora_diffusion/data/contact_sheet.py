"""Draw a contact sheet of a training folder: every image as training crops it, with its caption."""

import textwrap

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lora_diffusion.config.train import DataConfig
from lora_diffusion.data.checks import DatasetReport
from lora_diffusion.data.transforms import make_view

_BACKGROUND, _TEXT_COLOR, _CAPTION_COLOR, _WARNING_COLOR = (250, 250, 248), (30, 32, 40), (110, 114, 124), (192, 86, 33)
_CELL_PX, _TEXT_PX, _GAP_PX, _MAX_COLUMNS = 180, 62, 14, 6


def draw_contact_sheet(report: DatasetReport, config: DataConfig) -> Image.Image:
    """Draw the images of a report as thumbnails with file names and captions.

    The file names of images with a problem are drawn in orange.

    Args:
        report: The report of `check_dataset`.
        config: The data settings, which decide the crop.
    """
    count = len(report.examples)
    columns = min(_MAX_COLUMNS, count)
    rows = -(-count // columns)
    width, height = _CELL_PX + _GAP_PX, _CELL_PX + _TEXT_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * width + _GAP_PX, rows * height + _GAP_PX), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    flagged = {path for pair in report.duplicates for path in pair}
    flagged |= {*report.upscaled, *report.without_trigger, *(path for path, _ in report.long_captions)}
    for number, (example, bucket) in enumerate(zip(report.examples, report.buckets, strict=True)):
        left, top = _GAP_PX + number % columns * width, _GAP_PX + number // columns * height
        thumbnail = _resize_thumbnail(make_view(example, bucket, config, seed=0, variant=0).pixels)
        sheet.paste(thumbnail, (left + (_CELL_PX - thumbnail.width) // 2, top + (_CELL_PX - thumbnail.height) // 2))
        name = textwrap.shorten(example.picture.name, 28, placeholder="…")
        color = _WARNING_COLOR if example.picture in flagged else _TEXT_COLOR
        draw.text((left, top + _CELL_PX + 4), name, fill=color, font=font)
        caption = _wrap_caption(example.caption)
        draw.multiline_text((left, top + _CELL_PX + 20), caption, fill=_CAPTION_COLOR, font=font, spacing=2)
    return sheet


def _wrap_caption(caption: str) -> str:
    """Wrap a caption and cut it after two lines."""
    lines = textwrap.wrap(caption, 30)
    return "\n".join([*lines[:1], lines[1] if len(lines) == 2 else f"{lines[1]} …"] if len(lines) > 1 else lines)


def _resize_thumbnail(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, height, width) in [-1, 1] to an image that fills its cell; small images are not smoothed."""
    array = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    picture = Image.fromarray(array)
    scale = _CELL_PX / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
