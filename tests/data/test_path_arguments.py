"""Every public function of the data package that takes a path accepts a string, a `Path` and any `os.PathLike`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_diffusion import data
from lora_diffusion.data import duplicates, images
from tests.helpers.path_arguments import SPELLINGS, functions_with_paths

READERS: dict[str, Callable[[Any], Any]] = {
    "duplicates.image_difference_hash": duplicates.image_difference_hash,
    "images.read_alpha": images.read_alpha,
    "images.read_mask": images.read_mask,
    "images.read_picture": images.read_picture,
    "images.read_size": images.read_size,
}


def test_every_function_with_a_path_is_tested() -> None:
    assert functions_with_paths(data) == set(READERS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", READERS)
def test_an_image_is_read_from_any_path(name: str, spelling: Callable[[Path], Any], tmp_path: Path) -> None:
    Image.effect_noise((8, 8), 50).save(tmp_path / "a.png")
    assert READERS[name](spelling(tmp_path / "a.png")) == READERS[name](tmp_path / "a.png")
