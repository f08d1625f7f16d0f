"""Merge into single-file checkpoints, undo a merge, and blend checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm
from lora_diffusion.errors import BaseModelError, ConfigError, FamilyMismatchError, OutputError
from lora_diffusion.formats.checkpoints.checkpoint import open_checkpoint
from lora_diffusion.merging.merge import merge
from lora_diffusion.merging.recipe import read_merge_recipe
from lora_diffusion.merging.undo import copy_base, find_original_base, subtract_blend
from lora_diffusion.models.load import Base, load_base
from tests.helpers.checkpoint_files import FAMILIES, as_single, nothing, parameters_of
from tests.helpers.random_bases import byte_tokenizer, random_scheduler, random_vae, text_config
from tests.merging.test_merge import two


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_into_either_layout_gives_the_same_weights(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    single = as_single(base, tmp_path / "one.safetensors")
    merge(str(base.folder), two(base), tmp_path / "folder")
    merge(str(single), two(base), tmp_path / "merged.safetensors")
    merge(str(base.folder), two(base), tmp_path / "across.safetensors")
    folder = open_checkpoint(tmp_path / "folder")
    for file in ("merged", "across"):
        other = open_checkpoint(tmp_path / f"{file}.safetensors")
        assert all(torch.equal(other.parameters[n].read(), stored.read()) for n, stored in folder.parameters.items())


def sd2_folder(folder: Path) -> Path:
    """Save a small SD 2.x pipeline with the real context width, from which the family is detected."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=1024,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
    )
    config = text_config(1024, len(tokenizer))
    config.num_hidden_layers = 2
    StableDiffusionPipeline(
        vae=random_vae(),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=random_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_sd2_keeps_its_projections_in_one_tensor_as_open_clip_does(tmp_path: Path) -> None:
    base = load_base(str(sd2_folder(tmp_path / "sd2")), device=torch.device("cpu"))
    assert base.family.name == "sd2"
    single = as_single(base, tmp_path / "one.safetensors")
    fused = load_file(single)["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    attention = base.pipe.text_encoder.get_submodule(
        "text_model.encoder.layers.0.self_attn"
        if hasattr(base.pipe.text_encoder, "text_model")
        else "encoder.layers.0.self_attn"
    )
    assert torch.equal(fused, torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"]))
    merge(str(single), two(base), tmp_path / "merged.safetensors")
    merge(str(base.folder), two(base), tmp_path / "folder")
    folder, merged = open_checkpoint(tmp_path / "folder"), open_checkpoint(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged.parameters[n].read(), stored.read()) for n, stored in folder.parameters.items())


def test_what_no_pipeline_has_stays_in_a_single_file(sd: Base, tmp_path: Path) -> None:
    single = as_single(sd, tmp_path / "one.safetensors")
    save_file({**load_file(single), "alphas_cumprod": torch.ones(3)}, single, metadata={"sshs_model_hash": "stale"})
    merge(str(single), two(sd), tmp_path / "merged.safetensors")
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["alphas_cumprod"], torch.ones(3))
    assert b"sshs_model_hash" not in (tmp_path / "merged.safetensors").read_bytes()[:200_000]


def test_the_same_recipe_gives_the_same_bytes(sd: Base, tmp_path: Path) -> None:
    for name in ("first", "second"):
        merge(str(sd.folder), two(sd), tmp_path / f"{name}.safetensors", MergeConfig(precision="float16"))
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_undo_gives_the_base_back_bit_for_bit_from_the_base(sd: Base, tmp_path: Path) -> None:
    single = as_single(sd, tmp_path / "one.safetensors")
    merge(str(single), two(sd), tmp_path / "merged.safetensors")
    base = find_original_base(read_merge_recipe(tmp_path / "merged.safetensors"))
    assert base is not None
    copy_base(base, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == single.read_bytes()


def test_undo_subtracts_where_that_is_exact_and_refuses_where_it_is_not(sd: Base, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    merge(str(sd.folder), Blend(), half, MergeConfig(precision="float16"), bases=nothing(sd))
    wide, narrow = tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"
    merge(str(half), two(sd), wide, MergeConfig(precision="float32"))
    merge(str(half), two(sd), narrow)
    subtract_blend(wide, read_merge_recipe(wide), two(sd), tmp_path / "back.safetensors")
    own, back = load_file(half), load_file(tmp_path / "back.safetensors")
    assert own.keys() == back.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)
    with pytest.raises(ConfigError, match="does not restore the original weights exactly"):
        subtract_blend(narrow, read_merge_recipe(narrow), two(sd), tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_checkpoints_are_blended_as_a_weighted_sum_and_as_a_difference(sd: Base, tmp_path: Path) -> None:
    merge(str(sd.folder), two(sd), tmp_path / "tuned")
    tuned = str(tmp_path / "tuned")
    merge(str(sd.folder), Blend(), tmp_path / "sum", bases=[BaseTerm(added=tuned, weight=0.3)])
    difference = BaseTerm(added=tuned, taken=str(sd.folder), weight=-1.0)
    merge(tuned, Blend(), tmp_path / "back", bases=[difference])
    base, other = open_checkpoint(sd.folder), open_checkpoint(tmp_path / "tuned")
    found, back = open_checkpoint(tmp_path / "sum"), open_checkpoint(tmp_path / "back")
    for name, stored in base.parameters.items():
        own, changed = stored.read().double(), other.parameters[name].read().double()
        assert np.allclose(found.parameters[name].read(), 0.7 * own + 0.3 * changed, atol=1e-6)
        assert np.allclose(back.parameters[name].read(), own, atol=1e-6)


def test_shards_are_read_by_diffusers(sd: Base, tmp_path: Path) -> None:
    merge(str(sd.folder), two(sd), tmp_path / "whole")
    merge(str(sd.folder), two(sd), tmp_path / "cut", MergeConfig(shard_gb=0.0004))
    assert len(list((tmp_path / "cut" / "unet").glob("*-of-*.safetensors"))) > 1
    whole, cut = (load_base(str(tmp_path / name), device=torch.device("cpu")) for name in ("whole", "cut"))
    own, found = (parameters_of(base.pipe, (*sd.family.components, "vae")) for base in (whole, cut))
    assert all(torch.equal(own[key], found[key]) for key in own)


def test_stochastic_rounding_is_right_in_the_mean_and_the_same_for_one_seed(sd: Base, tmp_path: Path) -> None:
    name = "unet.conv_in.weight"
    merge(str(sd.folder), two(sd), tmp_path / "exact.safetensors")
    exact = open_checkpoint(tmp_path / "exact.safetensors").parameters[name].read()
    total = torch.zeros_like(exact)
    for seed in range(24):
        config = MergeConfig(precision="bfloat16", stochastic_seed=seed)
        merge(str(sd.folder), two(sd), tmp_path / "found.safetensors", config, force=True)
        found = open_checkpoint(tmp_path / "found.safetensors").parameters[name].read().float()
        assert float((found - exact).abs().max()) <= float(exact.abs().max()) * 2**-7
        total += found / 24
    once = exact.bfloat16().float()
    assert float((total - exact).norm()) < 0.5 * float((once - exact).norm())


def test_mistakes_are_refused_and_nothing_is_written(sd: Base, sdxl: Base, tmp_path: Path) -> None:
    single = as_single(sd, tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="name a folder of the same family with --like"):
        merge(str(single), two(sd), tmp_path / "folder")
    with pytest.raises(OutputError, match="is the base itself"):
        merge(str(single), two(sd), single, force=True)
    with pytest.raises(OutputError, match="already exists"):
        merge(str(sd.folder), two(sd), single)
    merge(str(single), two(sd), tmp_path / "merged.safetensors")
    with pytest.raises(ConfigError, match="contains this very merge already"):
        merge(str(tmp_path / "merged.safetensors"), two(sd), tmp_path / "twice.safetensors")
    with pytest.raises(FamilyMismatchError, match=r"is tiny SDXL, but .* is tiny SD"):
        merge(str(sd.folder), Blend(), tmp_path / "no", bases=[BaseTerm(added=str(sdxl.folder), weight=0.5)])
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BaseModelError, match="is not a checkpoint in the original layout"):
        merge(str(tmp_path / "other.safetensors"), two(sd), tmp_path / "no.safetensors")
    with pytest.raises(BaseModelError, match=r"is not a \.safetensors file"):
        open_checkpoint(Path(__file__))
    with pytest.raises(ConfigError, match="carries no recipe"):
        read_merge_recipe(sd.folder)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"one.safetensors", "merged.safetensors", "other.safetensors"}


def test_overflow_is_refused_by_name_or_allowed(sd: Base, tmp_path: Path) -> None:
    huge = two(sd, 1e7, 0.0)
    with pytest.raises(ConfigError, match=r"\.weight: .*beyond the range of torch\.float16"):
        merge(str(sd.folder), huge, tmp_path / "no.safetensors", MergeConfig(precision="float16"))
    merge(str(sd.folder), huge, tmp_path / "yes.safetensors", MergeConfig(precision="float16", allow_overflow=True))
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(tmp_path / "yes.safetensors").values())
