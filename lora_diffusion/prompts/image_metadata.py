"""The infotext inside a picture: a PNG's `parameters`, or the EXIF UserComment of a JPEG or WebP in any coding."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.errors import ConfigError
from lora_diffusion.prompts.infotext import Infotext, find_settings_line, parse_infotext, split_lines

if TYPE_CHECKING:
    from PIL import Image


def read_infotext(path: Path) -> Infotext | None:
    """What a PNG, JPEG or WebP says about how it was made, or None if it says nothing.

    Raises ConfigError if there is no such picture, or if its `parameters` are written in another way.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # what PIL warns of, such as broken EXIF, ends in None
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            text = read_png_text(image)
            comment = "" if text.strip() else read_user_comment(image)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a PNG, JPEG or WebP that A1111 or Forge wrote") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: not a readable PNG, JPEG or WebP ({error}); give one as A1111 wrote it") from None
    if text.strip():
        return parse_infotext(text, source=str(path))
    # cameras write into the same place, so a comment without settings is no mistake
    return None if find_settings_line(split_lines(comment)) is None else parse_infotext(comment, source=str(path))


def read_png_text(image: "Image.Image") -> str:
    if image.format == "PNG" and "parameters" not in image.info:
        image.load()  # some programs write their texts behind the pixels
    text = image.info.get("parameters", "")
    return text if isinstance(text, str) else ""


def read_user_comment(image: "Image.Image") -> str:
    """The EXIF UserComment as text, empty if there is none; Fooocus writes it one level too high."""
    from PIL import ExifTags

    exif = image.getexif()
    tag = ExifTags.Base.UserComment
    value = exif.get_ifd(ExifTags.IFD.Exif).get(tag) or exif.get(tag)
    if isinstance(value, bytes):
        return decode_comment(value).rstrip("\0")  # padding
    return value if isinstance(value, str) else ""


def decode_comment(value: bytes) -> str:
    """A UserComment by its first eight bytes, which name the coding; some programs leave them out."""
    head, body = value[:8], value[8:]
    if head == b"UNICODE\0":
        return decode_utf16(body)
    return decode_utf8(body if head in (b"ASCII\0\0\0", bytes(8)) else value)


def decode_utf16(body: bytes) -> str:
    """Text in either byte order, since the standard leaves it open; the one with more ASCII in it is meant."""
    if b"\0" not in body.rstrip(b"\0"):
        return decode_utf8(body)  # settings have digits, and those a zero byte: written as UTF-8 against the standard
    whole = body[: len(body) // 2 * 2]
    texts = [whole.decode(order, errors="replace") for order in ("utf-16-be", "utf-16-le")]
    return max(texts, key=lambda text: sum(map(str.isascii, text))).removeprefix("\ufeff")


def decode_utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("latin-1")
