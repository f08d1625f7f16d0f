"""Every public function of merging that takes a path accepts a string, a `Path` and any other `os.PathLike`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion import merging
from lora_diffusion.adapters.blend import Blend, BlendSum
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.checkpoint import open_checkpoint
from lora_diffusion.merging.layout import plan_output
from lora_diffusion.merging.merge import estimate_rounding, merge
from lora_diffusion.merging.recipe import MergeRecipe, find_merge_recipe, read_merge_recipe
from lora_diffusion.merging.tensors import MergedTensors
from lora_diffusion.merging.textual_inversion import add_to_folder, save_beside
from lora_diffusion.merging.undo import copy_base, find_original_base, subtract_blend
from lora_diffusion.merging.writer import check_disk_space, patch_header_hashes, write_checkpoint
from lora_diffusion.models.load import Base
from tests.conftest import random_adapter
from tests.helpers.path_arguments import SPELLINGS, functions_with_paths

TESTED = {
    "layout.plan_output",
    "merge.estimate_rounding",
    "merge.merge",
    "recipe.find_merge_recipe",
    "recipe.read_merge_recipe",
    "textual_inversion.add_to_folder",
    "textual_inversion.save_beside",
    "undo.copy_base",
    "undo.find_original_base",
    "undo.subtract_blend",
    "writer.check_disk_space",
    "writer.patch_header_hashes",
    "writer.write_checkpoint",
}


@pytest.fixture(scope="module")
def blend(sd: Base) -> Blend:
    return Blend.of({random_adapter(sd, seed=1, text_encoders=()): 0.5})


@pytest.fixture(scope="module")
def single(sd_folder: Path, blend: Blend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged single file."""
    return merge(sd_folder, blend, tmp_path_factory.mktemp("merged") / "single.safetensors").output


def test_every_function_with_a_path_is_tested() -> None:
    assert functions_with_paths(merging) == TESTED


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_merge_accepts_any_path(
    spelling: Callable[[Path], Any], sd_folder: Path, single: Path, blend: Blend, tmp_path: Path
) -> None:
    report = merge(spelling(single), blend, spelling(tmp_path / "merged"), like=spelling(sd_folder), force=True)
    assert report.output == tmp_path / "merged"
    recipe = read_merge_recipe(spelling(report.output))
    assert (recipe.base, recipe.like) == (str(single), str(sd_folder))
    assert find_merge_recipe(spelling(report.output)) == recipe
    assert estimate_rounding(spelling(sd_folder), blend, MergeConfig(precision="float16")) > 0


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_undo_accepts_any_path(
    spelling: Callable[[Path], Any], sd_folder: Path, single: Path, blend: Blend, tmp_path: Path
) -> None:
    recipe = read_merge_recipe(single)
    original = find_original_base(recipe, spelling(sd_folder))
    assert original is not None
    copy_base(original, spelling(tmp_path / "copy"))
    assert open_checkpoint(tmp_path / "copy").hash == original.hash
    with pytest.raises(ConfigError, match="does not restore the original weights exactly"):
        subtract_blend(spelling(single), recipe, blend, spelling(tmp_path / "subtracted.safetensors"))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_writing_accepts_any_path(
    spelling: Callable[[Path], Any], sd_folder: Path, single: Path, tmp_path: Path
) -> None:
    config, tokens = MergeConfig(), {"sks": {"text_encoder": torch.ones(1, 32)}}
    plan = plan_output(open_checkpoint(single), single=False, like=spelling(sd_folder), config=config)
    check_disk_space(spelling(tmp_path / "out"), plan)
    recipe = MergeRecipe(base="x")
    nothing = MergedTensors(deltas=BlendSum(layers={}, biases={}), bases=(), config=config)
    with write_checkpoint(spelling(tmp_path / "out"), plan, nothing, recipe) as part:
        patch_header_hashes(spelling(part), plan, recipe, {"base_hash": "1" * 64})
        add_to_folder(spelling(part), tokens, open_checkpoint(sd_folder))
    found = find_merge_recipe(tmp_path / "out")
    assert found is not None and found.base_hash == "1" * 64
    assert save_beside(spelling(tmp_path / "a.safetensors"), tokens, "sd1") == [tmp_path / "a.sks.safetensors"]
