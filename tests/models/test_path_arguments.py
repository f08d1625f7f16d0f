"""Every public function of the models that takes a path accepts a string, a `Path` and any other `os.PathLike`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion import models
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.models.load import load_base
from lora_diffusion.models.locate import find_base, find_checkpoint, find_matching_checkpoint
from lora_diffusion.models.quantize import load_quantized_base
from tests.helpers.path_arguments import SPELLINGS, functions_with_paths

READERS: dict[str, Callable[[Any], Path]] = {
    "load.load_base": lambda path: load_base(path).folder,
    "locate.find_base": find_base,
    "locate.find_checkpoint": lambda path: find_checkpoint(path).path,
    "locate.find_matching_checkpoint": lambda path: find_matching_checkpoint(path, Blend()).path,
    "quantize.load_quantized_base": lambda path: load_quantized_base(path, "none").folder,
}


def test_every_function_with_a_path_is_tested() -> None:
    assert functions_with_paths(models) == set(READERS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", READERS)
def test_a_base_is_found_by_any_path(name: str, spelling: Callable[[Path], Any], sd_folder: Path) -> None:
    assert READERS[name](spelling(sd_folder)) == sd_folder.resolve()
