"""Picture files as they are meant to be seen: upright, 8-bit, in sRGB. What cannot be read is named."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
OTHER_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".psd", ".svg")
"""Pictures of kinds that are not read; they are named rather than passed over."""
ROTATED = range(5, 9)
"""EXIF orientations that swap width and height."""


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """A picture file, its header read. Raises DatasetError for one that cannot be decoded, or has several frames."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=tuple(dict.fromkeys(FORMATS.values()))) as picture:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            frames = getattr(picture, "n_frames", 1)
            if frames > 1:
                raise DatasetError(f"{path}: has {frames} frames; save the one to train on")
            yield picture
    except DatasetError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DatasetError(f"{path}: cannot be read as a picture ({error}); replace or remove it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DatasetError(f"{path}: is too large to be opened safely ({error}); scale it down") from None


def read_size(path: Path) -> tuple[int, int]:
    """Width and height upright, from the header alone."""
    with open_image(path) as picture:
        width, height = picture.size
        turned = picture.getexif().get(0x0112) in ROTATED
    return (height, width) if turned else (width, height)


def read_picture(path: Path) -> Image.Image:
    """RGB, upright: transparency on white, 16-bit gray scaled rather than clipped, colors turned into sRGB."""
    with open_image(path) as picture:
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture))


def read_alpha(path: Path) -> Image.Image:
    """The picture's own transparency, upright, 255 where it is opaque."""
    with open_image(path) as picture:
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")


def read_mask(path: Path) -> Image.Image:
    """A mask as 8-bit gray, upright."""
    with open_image(path) as picture:
        picture.load()
        return ImageOps.exif_transpose(picture).convert("L")


def to_rgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(ground, layer).convert("RGB")
    if picture.mode not in ("CMYK", "L"):
        picture = picture.convert("RGB")
    return to_srgb(picture, profile)


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB by a color profile, if there is one that can be read for the picture's mode, as CMYK from print has."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            turned = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert turned is not None
            return turned
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile is common and harmless; the plain conversion follows
    return picture.convert("RGB")
