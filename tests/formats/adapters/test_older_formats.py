"""Read cloneofsimo's order-keyed files, diffusers' older key layouts, and textual-inversion embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.architectures.detection import block_channels
from lora_diffusion.architectures.module_paths import LAYOUTS, module_paths
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.cloneofsimo import NEW_ORDER, OLD_ORDER, TEXT_ORDER
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.textual_inversion import save_embedding
from lora_diffusion.models.load import Base, quiet_libraries
from tests.conftest import random_adapter

REAL = Path(__file__).parents[4] / "shared" / "adapters" / "analog_svd_rank4.safetensors"


def order_keyed(order: tuple[str, ...], family: str = "sd1") -> dict[str, torch.Tensor]:
    """Return the tensors of a rank-1 cloneofsimo file whose `up` factors hold their position."""
    blocks = [p.removesuffix("attn1.to_q") for p in module_paths(LAYOUTS[family]) if p.endswith(".attn1.to_q")]
    traversal = [b for side in ("down", "up", "mid") for b in blocks if b.startswith(f"unet.{side}_block")]
    tensors: dict[str, torch.Tensor] = {}
    for i, path in enumerate(block + leaf for block in traversal for leaf in order):
        width = block_channels(path.removeprefix("unet."), family)
        assert width
        inner = 768 if "attn2.to_k" in path or "attn2.to_v" in path else width
        tensors[f"unet:{i}:up"] = torch.full((width * 8 if "ff." in path else width, 1), float(i))
        tensors[f"unet:{i}:down"] = torch.ones(1, inner)
    for i in range(48):
        tensors[f"text_encoder:{i}:up"] = torch.full((768, 1), float(i))
        tensors[f"text_encoder:{i}:down"] = torch.ones(1, 768)
    return tensors


@pytest.mark.parametrize("order", [OLD_ORDER, NEW_ORDER], ids=["diffusers to 0.14", "diffusers from 0.15"])
def test_both_orders_are_told_apart_by_shape(order: tuple[str, ...], tmp_path: Path) -> None:
    metadata = {"<s1>": "<embed>", "unet": "[]"}
    save_file({**order_keyed(order), "<s1>": torch.ones(768)}, tmp_path / "old.safetensors", metadata=metadata)
    adapter = load_adapter(tmp_path / "old.safetensors")
    assert (len(adapter.layers), adapter.metadata.family, adapter.metadata.source_format) == (192, "sd1", "order-keyed")
    first = "unet.down_blocks.0.attentions.0.transformer_blocks.0."
    middle = "unet.mid_block.attentions.0.transformer_blocks.0."
    for i, leaf in enumerate(order):
        assert float(adapter.layers[first + leaf].delta()[0, 0]) == i
        assert float(adapter.layers[middle + leaf].delta()[0, 0]) == 135 + i
    for i, leaf in enumerate(TEXT_ORDER):
        path = f"text_encoder.text_model.encoder.layers.11.self_attn.{leaf}"
        assert float(adapter.layers[path].delta()[0, 0]) == 44 + i
    assert list(adapter.tokens) == ["<s1>"]
    assert adapter.tokens["<s1>"]["text_encoder"].shape == (1, 768)


def test_the_list_form_is_the_same_in_a_pickle(tmp_path: Path) -> None:
    tensors = order_keyed(NEW_ORDER)
    halves = [tensors[f"unet:{i}:{half}"] for i in range(144) for half in ("up", "down")]
    torch.save(halves, tmp_path / "old.pt")
    assert len(load_adapter(tmp_path / "old.pt").layers) == 144


def test_missing_positions_and_unknown_orders_are_named(tmp_path: Path) -> None:
    tensors = order_keyed(NEW_ORDER)
    broken = {key: tensor for key, tensor in tensors.items() if key != "unet:7:up"}
    save_file(broken, tmp_path / "gap.safetensors")
    with pytest.raises(AdapterFormatError, match="up or down tensor of unet:7 is missing"):
        load_adapter(tmp_path / "gap.safetensors")
    shuffled = {**tensors, "unet:8:up": tensors["unet:0:up"]}
    save_file({k: v.clone() for k, v in shuffled.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterFormatError, match="either known order"):
        load_adapter(tmp_path / "odd.safetensors")


@pytest.mark.skipif(not REAL.is_file(), reason="the adapter trained by others is not part of this repository")
def test_an_adapter_trained_by_others() -> None:
    adapter = load_adapter(REAL)
    assert (len(adapter.layers), adapter.metadata.family, adapter.num_parameters) == (192, "sd1", 1_541_376)


OLD_NAMES = {
    "to_q": "processor.to_q_lora",
    "to_k": "processor.to_k_lora",
    "to_v": "processor.to_v_lora",
    "to_out.0": "processor.to_out_lora",
}


@pytest.mark.parametrize("spelling", ["processor", "dotted"])
def test_older_diffusers_spellings_mean_what_diffusers_makes_of_them(spelling: str, sd: Base, tmp_path: Path) -> None:
    adapter = random_adapter(sd, seed=4, rank=4, alpha=4.0)
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in adapter.layers.items():
        assert isinstance(layer, LoRALayer)
        stem = old_key(path, spelling)
        tensors |= {f"{stem}.down.weight": layer.down, f"{stem}.up.weight": layer.up}
    file = tmp_path / "old.safetensors"
    save_file(tensors, file)
    back = load_adapter(file)
    assert back.metadata.source_format == "diffusers (older spelling)"
    assert set(back.layers) == set(adapter.layers)
    for path, layer in adapter.layers.items():
        assert torch.equal(back.layers[path].delta(), layer.delta())
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd.folder, local_files_only=True, safety_checker=None)
    with quiet_libraries():
        pipe.load_lora_weights(file)
    loaded = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0")
    name = pipe.get_active_adapters()[0]
    theirs = loaded.get_delta_weight(name)
    ours = back.layers["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"].delta()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def old_key(path: str, spelling: str) -> str:
    if path.startswith("text_encoder."):
        return f"{path}.lora_linear_layer"
    if spelling != "processor":
        return f"{path}.lora"
    leaf = next(leaf for leaf in OLD_NAMES if path.endswith(f".{leaf}"))
    return f"{path.removesuffix(leaf)}{OLD_NAMES[leaf]}"


def test_learned_tokens_in_every_form(tmp_path: Path) -> None:
    vectors = torch.randn(3, 768)
    save_file({"<cat>": vectors}, tmp_path / "diffusers.safetensors")
    save_file({"emb_params": vectors}, tmp_path / "cat.safetensors")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat"}, tmp_path / "a1111.pt")
    save_file({"clip_l": vectors, "clip_g": torch.randn(3, 1280)}, tmp_path / "xl.safetensors")
    found = {
        name: load_adapter(tmp_path / name).tokens
        for name in ("diffusers.safetensors", "cat.safetensors", "a1111.pt", "xl.safetensors")
    }
    assert [list(tokens) for tokens in found.values()] == [["<cat>"], ["cat"], ["cat"], ["xl"]]
    assert all(torch.equal(next(iter(t.values()))["text_encoder"], vectors) for t in found.values())
    assert found["xl.safetensors"]["xl"]["text_encoder_2"].shape == (3, 1280)


@pytest.mark.parametrize("two", [False, True])
def test_a_learned_token_is_written_as_diffusers_reads_it(two: bool, tmp_path: Path) -> None:
    token = {"text_encoder": torch.randn(2, 768)} | ({"text_encoder_2": torch.randn(2, 1280)} if two else {})
    metadata = AdapterMetadata(name="cat", family="sdxl" if two else "sd1")
    save_embedding(Adapter(layers={}, tokens={"cat": token}, metadata=metadata), tmp_path / "cat.safetensors")
    back = load_adapter(tmp_path / "cat.safetensors")
    assert back.tokens.keys() == {"cat"}
    assert all(torch.equal(back.tokens["cat"][component], token[component]) for component in token)
