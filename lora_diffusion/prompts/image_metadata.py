"""Read the infotext of an image: the `parameters` of a PNG, or the EXIF UserComment of a JPEG or WebP."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.errors import ConfigError
from lora_diffusion.prompts.infotext import Infotext, find_settings_line, parse_infotext, split_lines

if TYPE_CHECKING:
    from PIL import Image


def read_infotext(path: str | os.PathLike[str]) -> Infotext | None:
    """Read the infotext of a PNG, JPEG or WebP.

    Returns:
        The parsed infotext, or None if the image has none.

    Raises:
        ConfigError: If the image cannot be read, or its `parameters` are not an infotext.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    try:
        # an image for which PIL warns, for example of broken EXIF, is treated as one without infotext
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            text = _read_png_text(image)
            comment = "" if text.strip() else _read_user_comment(image)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a PNG, JPEG or WebP written by A1111 or Forge") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{path}: not a readable PNG, JPEG or WebP ({error}); expected an image written by A1111 or Forge"
        ) from None
    if text.strip():
        return parse_infotext(text, source=str(path))
    # cameras write UserComment too, so a comment without settings is not an error
    return None if find_settings_line(split_lines(comment)) is None else parse_infotext(comment, source=str(path))


def _read_png_text(image: "Image.Image") -> str:
    if image.format == "PNG" and "parameters" not in image.info:
        image.load()  # some programs write text chunks after the pixels
    text = image.info.get("parameters", "")
    return text if isinstance(text, str) else ""


def _read_user_comment(image: "Image.Image") -> str:
    """Return the EXIF UserComment, or an empty string. Fooocus writes it into the main directory of the EXIF data."""
    from PIL import ExifTags

    exif = image.getexif()
    tag = ExifTags.Base.UserComment
    value = exif.get_ifd(ExifTags.IFD.Exif).get(tag) or exif.get(tag)
    if isinstance(value, bytes):
        return decode_comment(value).rstrip("\0")
    return value if isinstance(value, str) else ""


def decode_comment(value: bytes) -> str:
    """Decode an EXIF UserComment by its first eight bytes, which name the encoding; some programs omit them."""
    head, body = value[:8], value[8:]
    if head == b"UNICODE\0":
        return _decode_utf16(body)
    return _decode_utf8(body if head in (b"ASCII\0\0\0", bytes(8)) else value)


def _decode_utf16(body: bytes) -> str:
    """Decode UTF-16 of unknown byte order, which the standard leaves open; the order with more ASCII is chosen."""
    if b"\0" not in body.rstrip(b"\0"):
        # UTF-16 of any infotext has zero bytes because of its digits, so this is UTF-8, against the standard
        return _decode_utf8(body)
    even = body[: len(body) // 2 * 2]
    texts = [even.decode(order, errors="replace") for order in ("utf-16-be", "utf-16-le")]
    return max(texts, key=lambda text: sum(map(str.isascii, text))).removeprefix("\ufeff")


def _decode_utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("latin-1")
