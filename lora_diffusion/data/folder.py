"""Read a training folder of images with captions and masks.

Nothing is skipped silently: an image without a caption, a caption without an image, or an unsupported image format is
an error.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.config.train import DataConfig
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.data.images import FORMATS, OTHER_SUFFIXES
from lora_diffusion.errors import DatasetError

CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files."""
METADATA = "metadata.jsonl"
"""The file with all captions in a Hugging Face `imagefolder` dataset."""
_KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")
"""kohya's folder names: the number of repeats, and the caption of images that have none (`10_sks dog`)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training image with its caption."""

    picture: Path
    """The image file."""
    caption: str
    """The caption, with runs of whitespace replaced by single spaces."""
    repeats: int = 1
    """How often the image occurs in one pass over its folder."""
    mask: Path | None = None
    """The file with the loss mask; the image itself if its alpha channel is the mask."""


def read_dataset(config: DataConfig) -> tuple[Example, ...]:
    """Read the images and captions of a folder and of its kohya subfolders, such as `10_sks dog`.

    The caption of `a.png` is read from `a.txt` or `a.caption`, or from the folder's metadata.jsonl, with the keys
    `file_name` and `text` or `caption` as in a Hugging Face `imagefolder` dataset. An image without a caption gets
    `config.instance_prompt`, or the words in the name of its kohya folder.

    Args:
        config: The data settings.

    Returns:
        The examples, sorted by path.

    Raises:
        DatasetError: If the folder is missing or empty, an image lacks its caption or mask, a caption or mask lacks its
            image, or an image has an unsupported format.
    """
    folder = config.folder
    subfolders = [path for path in _list_entries(folder) if path.is_dir() and _KOHYA_FOLDER.fullmatch(path.name)]
    if not subfolders and (folder / "train").is_dir():
        subfolders = [folder / "train"]
    examples = [example for path in (folder, *subfolders) for example in _read_folder(path, config)]
    if not examples:
        raise DatasetError(
            f"{folder}: no images found; expected {', '.join(FORMATS)} files, each with a .txt caption, or subfolders "
            "of them with names such as 10_cat"
        )
    return tuple(sorted(examples, key=lambda example: example.picture))


def _list_entries(folder: Path) -> list[Path]:
    """List the contents of a folder without hidden files, sorted. Raises DatasetError."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{folder}: no such folder; expected a folder of images with .txt captions") from None
    except OSError as error:
        raise DatasetError(
            f"{folder}: cannot be read ({error.strerror}); give a folder of images with .txt captions"
        ) from None


def _read_folder(folder: Path, config: DataConfig) -> list[Example]:
    """Read the images of one folder, without its subfolders."""
    files = [path for path in _list_entries(folder) if path.is_file()]
    pictures = [p for p in files if p.suffix.lower() in FORMATS and not _is_mask(p)]
    _check_no_ignored_files(files, pictures)
    metadata = _read_metadata(folder, pictures) if (folder / METADATA).is_file() else {}
    match = _KOHYA_FOLDER.fullmatch(folder.name)
    repeats, words = (int(match[1]), match[2]) if match else (1, "")
    if repeats < 1:
        raise DatasetError(f"{folder}: its name asks for 0 repeats; rename it to 1_{words} or move it elsewhere")
    fallback = config.instance_prompt or words.replace("_", " ").strip()
    return [
        Example(
            picture=picture,
            caption=metadata.get(picture.name) or _read_caption(picture, fallback),
            repeats=repeats,
            mask=_find_mask(picture, config),
        )
        for picture in pictures
    ]


def _check_no_ignored_files(files: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Raise DatasetError for files that would otherwise be ignored or ambiguous."""
    unsupported = [p for p in files if p.suffix.lower() in OTHER_SUFFIXES]
    if unsupported:
        raise DatasetError(
            f"{unsupported[0]}: unsupported image format ({len(unsupported)} such files); convert it to PNG"
        )
    stems = [p.stem for p in pictures]
    clash = next((p for p in pictures if stems.count(p.stem) > 1), None)
    if clash:
        raise DatasetError(f"{clash}: two images share the caption {clash.stem}.txt; rename one of them")
    captions = [p for p in files if p.suffix.lower() in CAPTION_SUFFIXES]
    orphans = [p for p in captions if p.stem not in stems]
    if orphans:
        raise DatasetError(
            f"{orphans[0]}: caption without an image ({len(orphans)} such files); "
            f"add {orphans[0].stem}.png or remove the caption"
        )
    masks = [p for p in files if p.suffix.lower() in FORMATS and _is_mask(p) and Path(p.stem).stem not in stems]
    if masks:
        raise DatasetError(
            f"{masks[0]}: mask without an image ({len(masks)} such files); add the image or remove the mask"
        )


def _is_mask(path: Path) -> bool:
    """Return whether a file is a mask, such as `a.mask.png`."""
    return Path(path.stem).suffix.lower() == ".mask"


def _read_caption(picture: Path, fallback: str) -> str:
    """Read the caption file of an image.

    Raises DatasetError if there is none and no fallback, if two files differ, or if the caption is empty.
    """
    files = [path for suffix in CAPTION_SUFFIXES if (path := picture.with_suffix(suffix)).is_file()]
    texts = {path: _read_text(path) for path in files}
    if len(set(texts.values())) > 1:
        raise DatasetError(
            f"{picture}: {files[0].name} and {files[1].name} have different captions; remove one of them"
        )
    if not files:
        if fallback:
            return fallback
        raise DatasetError(
            f"{picture}: has no caption; write one to {picture.stem}.txt next to it, or set data.instance_prompt"
        )
    return texts[files[0]]


def _read_text(path: Path) -> str:
    """Read a caption file, with runs of whitespace replaced by single spaces. Raises DatasetError."""
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); expected a caption as UTF-8 text") from None
    if not caption:
        raise DatasetError(f"{path}: is empty; write a caption that describes the image")
    return caption


def _read_metadata(folder: Path, pictures: Iterable[Path]) -> dict[str, str]:
    """Read the captions in metadata.jsonl by file name, for every image of a folder. Raises DatasetError."""
    path, captions = folder / METADATA, dict[str, str]()
    names = {picture.name for picture in pictures}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            name, caption = str(row["file_name"]), str(row.get("text") or row["caption"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DatasetError(
                f'{path}: line {number} is not valid; expected {{"file_name": ..., "text": ...}}; correct or remove it'
            ) from None
        if name not in names:
            raise DatasetError(
                f"{path}: line {number} names {name}, which does not exist; add the image or remove the line"
            )
        captions[name] = " ".join(caption.split())
    missing = sorted(names - captions.keys())
    if missing:
        raise DatasetError(
            f"{folder / missing[0]}: is not in {METADATA} ({len(missing)} such images); add a line for it"
        )
    return captions


def _find_mask(picture: Path, config: DataConfig) -> Path | None:
    """Return the mask file of an image if masks are enabled. Raises DatasetError if it is missing."""
    if config.masks == "none":
        return None
    if config.masks == "alpha":
        return picture
    mask = next(
        (path for suffix in FORMATS if (path := picture.with_name(f"{picture.stem}.mask{suffix}")).is_file()), None
    )
    if mask is None:
        raise DatasetError(f"{picture}: has no mask; add {picture.stem}.mask.png, white where the loss should count")
    return mask


def data_hash(examples: Iterable[Example]) -> str:
    """Compute the SHA-256 of a dataset: the bytes of all images and masks, the captions and the repeats, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(bytes.fromhex(file_hash(example.picture)))
        digest.update(hashlib.sha256(example.caption.encode()).digest())
        if example.mask is not None or example.repeats != 1:
            mask = file_hash(example.mask) if example.mask else ""
            digest.update(f"{example.repeats} {mask}".encode())
    return digest.hexdigest()
