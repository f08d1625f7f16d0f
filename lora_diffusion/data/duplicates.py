"""Find near-duplicate images by their difference hash (dHash; Krawetz, 2013).

The image is reduced to 9 x 8 gray pixels. Each of the 64 bits says whether a pixel is brighter than its left neighbor.
"""

import os
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from lora_diffusion.data.images import read_picture

MAX_DISTANCE = 4
"""Greatest number of differing bits, out of 64, between the hashes of near duplicates."""


def difference_hash(picture: Image.Image) -> int:
    """Compute the 64-bit difference hash of an image.

    Scaling, recompression and slight changes of brightness change only a few bits.
    """
    small = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def find_near_duplicates(hashes: Mapping[Path, int], distance: int = MAX_DISTANCE) -> tuple[tuple[Path, Path], ...]:
    """Find all pairs of images whose hashes differ in at most `distance` bits.

    Args:
        hashes: The difference hash of each image file.
        distance: The greatest number of differing bits.
    """
    pairs = combinations(hashes.items(), 2)
    return tuple((a, b) for (a, first), (b, second) in pairs if (first ^ second).bit_count() <= distance)


def image_difference_hash(path: str | os.PathLike[str]) -> int:
    """Compute the difference hash of an image file.

    Raises:
        DatasetError: If the file cannot be read as an image.
    """
    return difference_hash(read_picture(path))
