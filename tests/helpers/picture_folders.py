"""Folders of plain pictures with captions, to train on."""

from pathlib import Path

from PIL import Image

COLOURS = ("red", "blue", "green", "white")


def write_pictures(folder: Path, caption: str = "a {} wall, in sks style\n") -> Path:
    """Four pictures of 40x48, each of one colour, which its caption names."""
    folder.mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 48), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption.format(colour))
    return folder
