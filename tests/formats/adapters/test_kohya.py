"""Read and write kohya files: module names of full-size models, round trips, and metadata."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash
from lora_diffusion.adapters.layers import DoRALayer, FullLayer, Layer, LoHaLayer, LoKrLayer, LoRALayer
from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.architectures.module_paths import (
    LAYOUTS,
    changeable_paths,
    layout_from_configs,
    module_paths,
    norm_paths,
)
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.kohya import save_kohya
from lora_diffusion.formats.adapters.kohya_keys import kohya_name, kohya_names, kohya_spellings
from lora_diffusion.formats.adapters.load import load_adapter, load_meta_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.checkpoints.diffusers import read_layout
from lora_diffusion.formats.safetensors import read_header

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
ATTENTION_COUNTS = {"sd1": 192, "sd2": 192, "sdxl": 722}
CONV_COUNTS = {"sd1": 278, "sd2": 278, "sdxl": 788}
TEXT_COUNTS = {"sd1": [72], "sd2": [138], "sdxl": [72, 192]}
BLOCK_LEAVES = re.compile(r"(to_[qkv]|to_out\.0|ff\.net\.\S+|proj_in|proj_out)$")
TOP = re.compile(r"unet\.(conv_in|conv_out|time_embedding|add_embedding)")


@pytest.mark.parametrize("family", UNETS)
def test_the_table_is_the_full_size_model(family: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[family])
    live = {f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    norms = {f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    shape = LAYOUTS[family]
    assert live == {path for path in module_paths(shape) if path.startswith("unet.")}
    assert norms == {path for path in norm_paths(shape) if path.startswith("unet.")}


@pytest.mark.parametrize("family", UNETS)
def test_kohyas_counts(family: str) -> None:
    paths = module_paths(LAYOUTS[family])
    unet = [path for path in paths if path.startswith("unet.") and not TOP.match(path)]
    assert sum(BLOCK_LEAVES.search(path) is not None for path in unet) == ATTENTION_COUNTS[family]
    assert len(unet) == CONV_COUNTS[family]
    components = FAMILIES[family].components[1:]
    text = [sum(p.startswith(f"{c}.text_model.encoder") for p in paths) for c in components]
    assert text == TEXT_COUNTS[family]


@pytest.mark.parametrize("family", LAYOUTS)
def test_every_path_maps_to_kohyas_name_and_back(family: str) -> None:
    paths, table = changeable_paths(LAYOUTS[family]), kohya_names(family)
    assert len({kohya_name(path, family) for path in paths}) == len(paths)
    owners: dict[str, set[str]] = {}
    for path in paths:
        for name in kohya_spellings(path, family):
            assert table[name] == path
            owners.setdefault(name, set()).add(path)
    assert all(len(found) == 1 for found in owners.values())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
            "input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        ),
        ("unet.down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("unet.mid_block.resnets.1.conv2", "middle_block_2_out_layers_3"),
        ("unet.up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("unet.up_blocks.2.resnets.2.conv_shortcut", "output_blocks_8_0_skip_connection"),
        ("unet.conv_out", "out_2"),
    ],
)
def test_sdxls_names_are_the_published_ones(path: str, name: str) -> None:
    assert kohya_name(path, "sdxl") == f"lora_unet_{name}"


def test_the_embedded_bases_table_is_its_own() -> None:
    assert read_layout(sample_data_folder() / "tiny-sd")[1] == LAYOUTS["tiny-sd"]
    assert (
        layout_from_configs(
            {
                "down_block_types": ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"],
                "block_out_channels": [4],
                "layers_per_block": 1,
            },
            {},
        ).mid_attention
        == 1
    )


LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"
NORM = "unet.down_blocks.0.resnets.0.norm1"
WIDTHS = {LINEAR: 48, CONV: 48, TEXT: 128}


@st.composite
def layers(draw: st.DrawFn, path: str) -> Layer:  # noqa: PLR0911 (one return for each kind)
    """Draw a layer of any kind for a module of the embedded base, with any rank, alpha and dtype."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    width, rank = WIDTHS[path], draw(st.integers(1, 5))
    alpha = draw(st.floats(0.1, 64))
    kernel = (3, 3) if path == CONV else ()
    flat = width * 9 if kernel else width

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    kind = draw(st.sampled_from(["lora", "tucker", "loha", "loha-tucker", "lokr", "lokr-whole", "dora", "full"]))
    ones = [1] * len(kernel)
    lora = LoRALayer(down=randn(rank, width, *kernel), up=randn(width, rank, *ones), alpha=alpha)
    if kind == "tucker" and kernel:
        return LoRALayer(
            down=randn(rank, width, 1, 1), up=randn(width, rank, 1, 1), mid=randn(rank, rank, 3, 3), alpha=alpha
        )
    if kind == "loha" or (kind == "loha-tucker" and not kernel):
        a, b, c, d = randn(width, rank), randn(rank, flat), randn(width, rank), randn(rank, flat)
        return LoHaLayer(w1_a=a, w1_b=b, w2_a=c, w2_b=d, alpha=alpha)
    if kind == "loha-tucker":
        a, b, c, d = (randn(rank, width) for _ in range(4))
        return LoHaLayer(
            w1_a=a, w1_b=b, w2_a=c, w2_b=d, t1=randn(rank, rank, 3, 3), t2=randn(rank, rank, 3, 3), alpha=alpha
        )
    if kind == "lokr":
        return LoKrLayer(w1=randn(8, 8), w2_a=randn(width // 8, rank), w2_b=randn(rank, flat // 8), alpha=alpha)
    if kind == "lokr-whole":
        return LoKrLayer(w1=randn(8, 8), w2=randn(width // 8, width // 8, *kernel), alpha=1.0)
    if kind == "dora":
        per_output = draw(st.booleans())
        return DoRALayer(inner=lora, magnitude=randn(width, 1, *ones) if per_output else randn(1, width, *ones))
    return FullLayer(diff=randn(width, width, *kernel)) if kind == "full" else lora


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    chosen = draw(st.lists(st.sampled_from(sorted(WIDTHS)), min_size=1, unique=True))
    found: dict[str, Layer] = {path: draw(layers(path)) for path in chosen}
    biases = {CONV: torch.randn(48)} if draw(st.booleans()) else {}
    tokens = {"sks": {"text_encoder": torch.randn(2, 128)}} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        found[NORM] = FullLayer(diff=torch.randn(48))
    metadata = AdapterMetadata(name="x", family="tiny-sd", trigger_words=("sks",), description="some words")
    return Adapter(layers=found, biases=biases, tokens=tokens, metadata=metadata)


@settings(max_examples=60)
@pytest.mark.parametrize("writer", [save_adapter, save_kohya])
@given(adapter=adapters())
def test_writing_and_reading_give_the_same_deltas_to_the_bit(
    writer: Any, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    writer(adapter, path)
    back = load_adapter(path)
    assert adapter_hash(back) == adapter_hash(adapter)
    assert back.metadata.model_copy(update={"source_format": "native"}) == adapter.metadata
    for name, layer in adapter.layers.items():
        weight = torch.randn(layer.weight_shape)
        assert torch.equal(back.layers[name].delta(weight), layer.delta(weight))
    outline = load_meta_adapter(path)
    assert {p: x.weight_shape for p, x in outline.layers.items()} == {p: x.weight_shape for p, x in back.layers.items()}
    assert outline.kinds == back.kinds


def test_a_scale_of_two_whole_kronecker_factors_survives_in_kohyas_layout(tmp_path: Path) -> None:
    layer = LoKrLayer(w1=torch.randn(8, 8), w2=torch.randn(6, 6), alpha=2.5)
    save_kohya(Adapter(layers={LINEAR: layer}, metadata=AdapterMetadata(family="tiny-sd")), tmp_path / "k.safetensors")
    torch.testing.assert_close(load_adapter(tmp_path / "k.safetensors").layers[LINEAR].delta(), layer.delta())


def test_kohyas_header_says_what_interfaces_show(tmp_path: Path) -> None:
    layer = LoRALayer(down=torch.ones(4, 48), up=torch.ones(48, 4), alpha=2.0)
    metadata = AdapterMetadata(name="ink", family="tiny-sd", trigger_words=("sks", "ink"))
    save_kohya(Adapter(layers={LINEAR: layer}, metadata=metadata), tmp_path / "k.safetensors")
    entries = read_header(tmp_path / "k.safetensors").metadata
    assert (entries["ss_network_dim"], entries["ss_network_alpha"], entries["ss_output_name"]) == ("4", "2", "ink")
    assert entries["modelspec.trigger_phrase"] == "sks, ink"
    saved = load_file(tmp_path / "k.safetensors")
    assert float(saved[f"{kohya_name(LINEAR, 'tiny-sd')}.alpha"]) == 2.0


def kohya_file(path: Path, family: str, modules: dict[str, tuple[int, int]], **changes: torch.Tensor) -> Path:
    """Write a rank-2 kohya file with the given (out, in) of each module path."""
    tensors: dict[str, torch.Tensor] = dict(changes)
    for module, (out, inner) in modules.items():
        name = kohya_name(module, family)
        tensors[f"{name}.lora_down.weight"] = torch.ones(2, inner)
        tensors[f"{name}.lora_up.weight"] = torch.ones(out, 2)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("family", "width"), [("sd1", 768), ("sd2", 1024), ("sdxl", 2048)])
def test_the_family_is_recognized_by_the_width_of_the_text_context(family: str, width: int, tmp_path: Path) -> None:
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter = load_adapter(kohya_file(tmp_path / "a.safetensors", family, {block: (640, width)}))
    assert adapter.metadata.family == family
    assert adapter.layers[block].delta().shape == (640, width)


def test_one_foreign_key_refuses_the_file_unless_it_is_ignored(tmp_path: Path) -> None:
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    path = kohya_file(tmp_path / "a.safetensors", "sd1", {block: (640, 768)}, other=torch.ones(3))
    with pytest.raises(AdapterFormatError, match=r"1 of 4 keys are not recognized \(first: 'other'"):
        load_adapter(path)
    assert set(load_adapter(path, ignore=("oth*",)).layers) == {block}


def test_a_missing_or_zero_alpha_means_the_rank(tmp_path: Path) -> None:
    name = kohya_name(LINEAR, "tiny-sd")
    factors = {f"{name}.lora_down.weight": torch.ones(2, 48), f"{name}.lora_up.weight": torch.ones(48, 2)}
    for extra in ({}, {f"{name}.alpha": torch.tensor(0.0)}):
        save_file({**factors, **extra}, tmp_path / "a.safetensors")
        layer = load_adapter(tmp_path / "a.safetensors").layers[LINEAR]
        assert isinstance(layer, LoRALayer)
        assert layer.scale == 1.0


@pytest.mark.parametrize(
    ("entries", "variant"),
    [
        ({"ss_base_model_version": "sd_v2_v"}, "v-prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512/lora"}, ""),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "v-prediction"),
        ({"modelspec.prediction_type": "v"}, "v-prediction"),
        ({"ss_base_model_version": "sd_v2_inpainting"}, "inpainting"),
    ],
)
def test_the_variant_is_recognized_and_kept(entries: dict[str, str], variant: str, tmp_path: Path) -> None:
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    path = kohya_file(tmp_path / "a.safetensors", "sd2", {block: (640, 1024)})
    save_file(load_file(path), path, metadata=entries)
    adapter = load_adapter(path)
    assert (adapter.metadata.family, adapter.metadata.variant) == ("sd2", variant)
    save_kohya(adapter, tmp_path / "b.safetensors")
    written = read_header(tmp_path / "b.safetensors").metadata
    assert ("768-v" in written["modelspec.architecture"]) == (variant == "v-prediction")


def test_an_inpainting_unet_is_recognized_by_its_first_convolution(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 9, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(320, 2, 1, 1),
    }
    save_file(tensors, tmp_path / "inpaint.safetensors")
    assert load_adapter(tmp_path / "inpaint.safetensors").metadata.variant == "inpainting"


def test_a_family_that_the_file_leaves_open_is_left_open(tmp_path: Path) -> None:
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    file = kohya_file(tmp_path / "te.safetensors", "sdxl", {path: (768, 768)})
    assert load_adapter(file).metadata.family == ""  # SD 1.x's encoder is SDXL's first
    save_file(load_file(file), file, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    assert load_adapter(file).metadata.family == "sdxl"
