"""A generated image can be saved to a string, a `Path` and any other `os.PathLike`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_diffusion import inference
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.inference.sampling import GeneratedImage
from lora_diffusion.library.recipe import Recipe, read_recipe
from tests.helpers.path_arguments import SPELLINGS, functions_with_paths


def test_every_function_with_a_path_is_tested() -> None:
    assert functions_with_paths(inference) == {"sampling.GeneratedImage.save"}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_image_is_saved_to_any_path(spelling: Callable[[Path], Any], tmp_path: Path) -> None:
    recipe = Recipe(base="x", base_hash="y", settings=GenerateConfig(prompt="a cat"))
    GeneratedImage(image=Image.new("RGB", (8, 8)), recipe=recipe).save(spelling(tmp_path / "a.png"))
    assert read_recipe(tmp_path / "a.png") == recipe
