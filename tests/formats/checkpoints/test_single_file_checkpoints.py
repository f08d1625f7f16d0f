"""Read and write single-file checkpoints in the original layout, with diffusers as the reference reader."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.formats.checkpoints.checkpoint import open_checkpoint
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import Base, load_base, quiet_libraries
from tests.helpers.checkpoint_files import FAMILIES, as_single, nothing, parameters_of


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_our_single_file_as_the_pipeline_it_came_from(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    single = as_single(base, tmp_path / "one.safetensors")
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    parts = {name: part for name, part in base.pipe.components.items() if name.startswith(("text", "token"))}
    with quiet_libraries():
        pipe = kind.from_single_file(str(single), config=str(base.folder), local_files_only=True, **parts)
    for component in ("unet", "vae"):
        own, found = getattr(base.pipe, component).state_dict(), getattr(pipe, component).state_dict()
        assert own.keys() == found.keys()
        assert all(torch.equal(own[key], found[key]) for key in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_went_through_a_single_file_is_the_same(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    single = as_single(base, tmp_path / "one.safetensors")
    merge(str(single), Blend(), tmp_path / "again", bases=nothing(base), like=base.folder, force=True)
    again = load_base(str(tmp_path / "again"), device=torch.device("cpu"))
    components = (*base.family.components, "vae")
    own, found = parameters_of(base.pipe, components), parameters_of(again.pipe, components)
    assert own.keys() == found.keys()
    assert all(torch.equal(own[key], found[key]) for key in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_single_file_is_found_under_its_own_name(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    folder, single = open_checkpoint(base.folder), open_checkpoint(as_single(base, tmp_path / "one.safetensors"))
    assert (single.family, single.layout) == (folder.family, folder.layout)
    assert single.shapes == folder.shapes
    assert all(torch.equal(stored.read(), folder.parameters[name].read()) for name, stored in single.parameters.items())
