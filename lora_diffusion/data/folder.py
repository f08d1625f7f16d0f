"""A folder of pictures with captions, read strictly: nothing is skipped without a word. Knows nothing of models."""

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
METADATA = "metadata.jsonl"
REPEATED = re.compile(r"(\d+)_(.+)")
"""kohya's names of folders: repeats, and words that pictures without a caption get."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture and what it is called."""

    picture: Path
    caption: str
    repeats: int = 1
    mask: Path | None = None
    """The file with its mask; the picture itself where that is its alpha."""


def read_dataset(config: DataConfig) -> tuple[Example, ...]:
    """Pictures and captions of a folder and of those in it that kohya's naming repeats, sorted by path.

    A caption stands in `a.txt` or `a.caption` beside `a.png`, or in metadata.jsonl (`file_name` with `text` or
    `caption`, as Hugging Face's image folders have it); otherwise it is the instance prompt, or the words in the name
    of a kohya folder. Raises DatasetError for a missing or empty folder, and for anything that would be passed over: a
    picture without caption, a caption without picture, a picture of a kind that is not read, a mask that is missing.
    """
    folder = config.folder
    inner = [path for path in list_entries(folder) if path.is_dir() and REPEATED.fullmatch(path.name)]
    if not inner and (folder / "train").is_dir():
        inner = [folder / "train"]
    examples = [example for place in (folder, *inner) for example in read_folder(place, config)]
    if not examples:
        raise DatasetError(
            f"{folder}: no pictures in it; expected {', '.join(FORMATS)} files, each with a .txt caption, or folders "
            "of them named like 10_cat"
        )
    return tuple(sorted(examples, key=lambda example: example.picture))


def list_entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, hidden files left out. Raises DatasetError."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{folder}: no such folder; expected pictures, each with a caption in a .txt file") from None
    except OSError as error:
        raise DatasetError(
            f"{folder}: cannot be read ({error.strerror}); give a folder of captioned pictures"
        ) from None


def read_folder(folder: Path, config: DataConfig) -> list[Example]:
    """The pictures of one folder."""
    files = [path for path in list_entries(folder) if path.is_file()]
    pictures = [p for p in files if p.suffix.lower() in FORMATS and not is_mask(p)]
    check_no_ignored_files(files, pictures)
    listed = read_metadata(folder, pictures) if (folder / METADATA).is_file() else {}
    named = REPEATED.fullmatch(folder.name)
    repeats, words = (int(named[1]), named[2]) if named else (1, "")
    if repeats < 1:
        raise DatasetError(f"{folder}: its name asks for 0 repeats; name it 1_{words} or move it away")
    fallback = config.instance_prompt or words.replace("_", " ").strip()
    return [
        Example(
            picture=picture,
            caption=listed.get(picture.name) or read_caption(picture, fallback),
            repeats=repeats,
            mask=find_mask(picture, config),
        )
        for picture in pictures
    ]


def check_no_ignored_files(files: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Raise DatasetError for files that would be left out in silence."""
    foreign = [p for p in files if p.suffix.lower() in OTHER_SUFFIXES]
    if foreign:
        raise DatasetError(
            f"{foreign[0]}: a picture of a kind that is not read ({len(foreign)} in all); convert it to PNG"
        )
    stems = [p.stem for p in pictures]
    twin = next((p for p in pictures if stems.count(p.stem) > 1), None)
    if twin:
        raise DatasetError(f"{twin}: two pictures share the caption {twin.stem}.txt; rename one of them")
    captions = [p for p in files if p.suffix.lower() in CAPTION_SUFFIXES]
    orphans = [p for p in captions if p.stem not in stems]
    if orphans:
        raise DatasetError(
            f"{orphans[0]}: a caption without its picture ({len(orphans)} in all); "
            f"add {orphans[0].stem}.png or remove the caption"
        )
    masks = [p for p in files if p.suffix.lower() in FORMATS and is_mask(p) and Path(p.stem).stem not in stems]
    if masks:
        raise DatasetError(f"{masks[0]}: a mask without its picture ({len(masks)} in all); add it or remove the mask")


def is_mask(path: Path) -> bool:
    return Path(path.stem).suffix.lower() == ".mask"


def read_caption(picture: Path, fallback: str) -> str:
    """From the file beside the picture, white space folded. Raises DatasetError for none, two, or an empty one."""
    found = [path for suffix in CAPTION_SUFFIXES if (path := picture.with_suffix(suffix)).is_file()]
    texts = {path: read_text(path) for path in found}
    if len(set(texts.values())) > 1:
        raise DatasetError(f"{picture}: {found[0].name} and {found[1].name} say different things; keep one of them")
    if not found:
        if fallback:
            return fallback
        raise DatasetError(
            f"{picture}: has no caption; write one into {picture.stem}.txt beside it, or give data.instance_prompt"
        )
    return texts[found[0]]


def read_text(path: Path) -> str:
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); expected a caption as UTF-8 text") from None
    if not caption:
        raise DatasetError(f"{path}: is empty; write what the picture shows")
    return caption


def read_metadata(folder: Path, pictures: Iterable[Path]) -> dict[str, str]:
    """Captions by file name, for every picture of the folder. Raises DatasetError."""
    path, captions = folder / METADATA, dict[str, str]()
    names = {picture.name for picture in pictures}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            name, caption = str(row["file_name"]), str(row.get("text") or row["caption"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DatasetError(f"{path}: line {number} is no row with file_name and text; mend or remove it") from None
        if name not in names:
            raise DatasetError(f"{path}: line {number} names {name}, which is not there; add it or remove the line")
        captions[name] = " ".join(caption.split())
    missing = sorted(names - captions.keys())
    if missing:
        raise DatasetError(f"{folder / missing[0]}: is not in {METADATA} ({len(missing)} in all); add a line for it")
    return captions


def find_mask(picture: Path, config: DataConfig) -> Path | None:
    """Where the picture's mask is. Raises DatasetError if it should have one and has not."""
    if config.masks == "none":
        return None
    if config.masks == "alpha":
        return picture
    found = next(
        (path for suffix in FORMATS if (path := picture.with_name(f"{picture.stem}.mask{suffix}")).is_file()), None
    )
    if found is None:
        raise DatasetError(f"{picture}: has no mask; draw {picture.stem}.mask.png, white where the loss should count")
    return found


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over the bytes of all pictures and masks, captions and repeats, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(bytes.fromhex(file_hash(example.picture)))
        digest.update(hashlib.sha256(example.caption.encode()).digest())
        if example.mask is not None or example.repeats != 1:
            mask = file_hash(example.mask) if example.mask else ""
            digest.update(f"{example.repeats} {mask}".encode())
    return digest.hexdigest()
