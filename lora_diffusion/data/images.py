"""Read image files as upright 8-bit sRGB, with EXIF rotation, transparency and color profiles applied."""

import io
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lora_diffusion.errors import DatasetError

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Suffixes of supported image files, with Pillow's name of the format."""
OTHER_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".psd", ".svg")
"""Suffixes of unsupported image files, which are reported as errors instead of being ignored."""
_SWAPPED_ORIENTATIONS = range(5, 9)
"""EXIF orientations that swap width and height."""


@contextmanager
def _open_image(path: str | os.PathLike[str]) -> Generator[Image.Image]:
    """Open an image file and read its header. Raises DatasetError if it cannot be decoded or has several frames."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=tuple(dict.fromkeys(FORMATS.values()))) as picture:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            frames = getattr(picture, "n_frames", 1)
            if frames > 1:
                raise DatasetError(f"{path}: has {frames} frames; save the frame to train on as a still image")
            yield picture
    except DatasetError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DatasetError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DatasetError(f"{path}: is too large to be opened safely ({error}); downscale it") from None


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read the width and height of an image after EXIF rotation, without decoding the pixels.

    Raises:
        DatasetError: If the file cannot be read as an image or has several frames.
    """
    with _open_image(path) as picture:
        width, height = picture.size
        swapped = picture.getexif().get(0x0112) in _SWAPPED_ORIENTATIONS
    return (height, width) if swapped else (width, height)


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as 8-bit sRGB with its EXIF rotation applied.

    Transparent pixels are composited on white, 16-bit gray is scaled to 8 bits, and an embedded color profile is
    converted to sRGB.

    Raises:
        DatasetError: If the file cannot be read as an image or has several frames.
    """
    with _open_image(path) as picture:
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture))


def read_alpha(path: str | os.PathLike[str]) -> Image.Image:
    """Read the alpha channel of an image, with its EXIF rotation applied; 255 is opaque.

    Raises:
        DatasetError: If the file cannot be read as an image or has several frames.
    """
    with _open_image(path) as picture:
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")


def read_mask(path: str | os.PathLike[str]) -> Image.Image:
    """Read a mask as 8-bit gray, with its EXIF rotation applied.

    Raises:
        DatasetError: If the file cannot be read as an image or has several frames.
    """
    with _open_image(path) as picture:
        picture.load()
        return ImageOps.exif_transpose(picture).convert("L")


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert an image of any mode to sRGB."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        background = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(background, layer).convert("RGB")
    if picture.mode not in ("CMYK", "L"):
        picture = picture.convert("RGB")
    return _to_srgb(picture, profile)


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image to sRGB by its ICC profile, if it has a valid one for its mode."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb: Any = cast(Any, ImageCms).createProfile("sRGB")  # Pillow does not annotate the result
            converted = ImageCms.profileToProfile(picture, source, srgb, outputMode="RGB")
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # broken profiles are common; the plain conversion below is good enough
    return picture.convert("RGB")
