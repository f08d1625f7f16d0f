"""Folders of plain pictures with captions, to train on."""

from pathlib import Path

from PIL import Image

COLORS = ("red", "blue", "green", "white")


def write_pictures(folder: Path, caption: str = "a {} wall, in sks style\n") -> Path:
    """Four pictures of 40x48, each of one color, which its caption names."""
    folder.mkdir()
    for i, color in enumerate(COLORS):
        Image.new("RGB", (40, 48), color).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption.format(color))
    return folder
