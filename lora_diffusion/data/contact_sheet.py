"""All pictures of a folder at a glance, cut as training cuts them, each with its caption."""

import textwrap

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lora_diffusion.config.train import DataConfig
from lora_diffusion.data.checks import DatasetReport
from lora_diffusion.data.transforms import make_view

GROUND, INK, PALE, WARN = (250, 250, 248), (30, 32, 40), (110, 114, 124), (192, 86, 33)
CELL_PX, TEXT_PX, GAP_PX, COLUMNS = 180, 62, 14, 6


def draw_contact_sheet(report: DatasetReport, config: DataConfig) -> Image.Image:
    """Thumbnails in their buckets' shapes; names of those with something to look at stand out."""
    count = len(report.examples)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    width, height = CELL_PX + GAP_PX, CELL_PX + TEXT_PX + GAP_PX
    sheet = Image.new("RGB", (columns * width + GAP_PX, rows * height + GAP_PX), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    odd = {path for pair in report.twins for path in pair} | set(report.enlarged) | set(report.untriggered)
    odd |= {path for path, _ in report.long}
    for number, (example, bucket) in enumerate(zip(report.examples, report.buckets, strict=True)):
        left, top = GAP_PX + number % columns * width, GAP_PX + number // columns * height
        picture = resize_thumbnail(make_view(example, bucket, config, seed=0, variant=0).pixels)
        sheet.paste(picture, (left + (CELL_PX - picture.width) // 2, top + (CELL_PX - picture.height) // 2))
        name = textwrap.shorten(example.picture.name, 28, placeholder="…")
        draw.text((left, top + CELL_PX + 4), name, fill=WARN if example.picture in odd else INK, font=font)
        draw.multiline_text((left, top + CELL_PX + 20), wrap_caption(example.caption), fill=PALE, font=font, spacing=2)
    return sheet


def wrap_caption(caption: str) -> str:
    """The first words on two lines."""
    lines = textwrap.wrap(caption, 30)
    return "\n".join([*lines[:1], lines[1] if len(lines) == 2 else f"{lines[1]} …"] if len(lines) > 1 else lines)


def resize_thumbnail(pixels: Tensor) -> Image.Image:
    """A picture (3, height, width) in -1..1 as large as its cell allows; small ones are enlarged without smoothing."""
    array = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    picture = Image.fromarray(array)
    scale = CELL_PX / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
