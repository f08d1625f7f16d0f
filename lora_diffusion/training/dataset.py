"""A folder of pictures with captions, read strictly: nothing is skipped without a word.

`a.png` has its caption in `a.txt`. Knows nothing of models.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lora_diffusion.errors import DatasetError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURE_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jxl", ".psd")
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture and what it is called."""

    picture: Path
    caption: str


def read_dataset(folder: Path) -> tuple[Example, ...]:
    """Pictures and captions of a folder, sorted by name.

    Raises DatasetError for a missing or empty folder, a picture without caption or a caption without picture.
    """
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{folder}: no such folder; expected pictures, each with a caption in a .txt file") from None
    except OSError as error:
        raise DatasetError(
            f"{folder}: cannot be read ({error.strerror}); give a folder of captioned pictures"
        ) from None
    pictures = [p for p in files if p.suffix.lower() in PICTURE_SUFFIXES]
    foreign = [p for p in files if p.suffix.lower() in OTHER_PICTURE_SUFFIXES]
    if foreign:
        raise DatasetError(
            f"{foreign[0]}: a picture of a kind that is not read ({len(foreign)} in all); convert it to PNG"
        )
    if not pictures:
        raise DatasetError(
            f"{folder}: no pictures in it; expected {', '.join(PICTURE_SUFFIXES)} files, each with a .txt caption"
        )
    stems = {p.stem for p in pictures}
    if len(stems) < len(pictures):
        twin = next(p for p in pictures if sum(q.stem == p.stem for q in pictures) > 1)
        raise DatasetError(f"{twin}: two pictures share the caption {twin.stem}.txt; rename one of them")
    orphans = [p for p in files if p.suffix.lower() == ".txt" and p.stem not in stems]
    if orphans:
        raise DatasetError(
            f"{orphans[0]}: a caption without its picture ({len(orphans)} in all); "
            f"add {orphans[0].stem}.png or remove the caption"
        )
    return tuple(Example(picture=p, caption=read_caption(p)) for p in pictures)


def data_hash(examples: tuple[Example, ...]) -> str:
    """SHA-256 over the bytes of all pictures and their captions, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(hashlib.sha256(example.picture.read_bytes()).digest())
        digest.update(hashlib.sha256(example.caption.encode()).digest())
    return digest.hexdigest()


def read_caption(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        raise DatasetError(f"{picture}: has no caption; write one into {path.name} beside it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); expected a caption as UTF-8 text") from None
    if not caption:
        raise DatasetError(f"{path}: is empty; write what {picture.name} shows")
    return caption


def load_picture(path: Path, size_px: int) -> Tensor:
    """(3, size, size) float32 in -1..1: turned as its EXIF says, transparency on white, scaled and centre-cropped.

    Raises DatasetError for a file that cannot be decoded.
    """
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot be read as a picture ({error}); replace or remove it") from None
    picture = ImageOps.fit(to_rgb(upright), (size_px, size_px), Image.Resampling.LANCZOS)
    array = torch.from_numpy(np.array(picture, dtype=np.float32))
    return array.permute(2, 0, 1) / 127.5 - 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB: transparency laid on white, 16-bit grey scaled rather than clipped."""
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("RGB")
