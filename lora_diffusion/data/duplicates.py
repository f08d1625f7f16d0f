"""Pictures that show the same: by a hash of what they look like, small and gray.

The difference hash (Krawetz, 2013): 64 bits, each whether a pixel of a 9 x 8 picture is brighter than the one before.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from lora_diffusion.data.images import read_picture

NEAR = 4
"""Bits of 64 in which pictures that look the same may differ."""


def difference_hash(picture: Image.Image) -> int:
    """64 bits that scaling, recompressing and slight changes of brightness hardly move."""
    small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def find_near_duplicates(hashes: Mapping[Path, int], distance: int = NEAR) -> tuple[tuple[Path, Path], ...]:
    """Pairs of pictures whose hashes differ in at most so many bits."""
    pairs = combinations(hashes.items(), 2)
    return tuple((a, b) for (a, first), (b, second) in pairs if (first ^ second).bit_count() <= distance)


def hash_file(path: Path) -> int:
    """Of a picture file. Raises DatasetError."""
    return difference_hash(read_picture(path))
