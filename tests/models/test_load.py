"""Loading a base by a string or a path, and the repr of a loaded base."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_diffusion.models.load import Base, load_base


@pytest.mark.parametrize("path_type", [str, Path])
def test_a_base_is_loaded_by_a_string_or_a_path(path_type: Callable[[Path], str | Path], sd_folder: Path) -> None:
    base = load_base(path_type(sd_folder), device=torch.device("cpu"))
    assert (base.name, base.folder) == (str(sd_folder), sd_folder.resolve())


def test_a_base_prints_its_family_origin_hash_dtype_and_device(sd: Base) -> None:
    text = repr(sd)
    assert "\n" not in text
    assert text == (
        f"Base(family={sd.family.name!r}, name={sd.name!r}, folder={str(sd.folder)!r}, "
        "dtype=torch.float32, device='cpu')"
    )
    assert repr(replace(sd, quantization="nf4")).endswith("quantization='nf4')")
