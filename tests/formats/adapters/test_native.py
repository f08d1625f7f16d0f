"""Read and write native files: exact round trips, reproducible bytes, and the same images as diffusers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.errors import AdapterFormatError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base, load_base, quiet_libraries
from tests.conftest import random_adapter

MODULES = ("unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "unet.x")


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    layers: dict[str, LoRALayer] = {}
    for path in draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True)):
        rank, kernel = draw(st.integers(1, 5)), draw(st.sampled_from([(), (3, 3)]))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        down = torch.randn(rank, 6, *kernel, generator=rng).to(dtype)
        up = torch.randn(7, rank, *[1] * len(kernel), generator=rng).to(dtype)
        layers[path] = LoRALayer(down=down, up=up, alpha=draw(st.floats(0.1, 64)))
    name = draw(st.text(st.characters(codec="utf-8"), max_size=9))
    return Adapter(layers=layers, metadata=AdapterMetadata(name=name or "x", trigger_words=("sks", name)))


@settings(max_examples=25)
@given(adapter=adapters())
def test_reading_gives_back_what_was_written(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    save_adapter(adapter, path)
    back = load_adapter(path)
    assert adapter_hash(back) == adapter_hash(adapter)
    assert back.metadata == adapter.metadata


def test_the_same_adapter_gives_the_same_bytes(sd: Base, tmp_path: Path) -> None:
    adapter = random_adapter(sd, seed=1)
    save_adapter(adapter, tmp_path / "a.safetensors")
    save_adapter(adapter, tmp_path / "b" / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b" / "a.safetensors").read_bytes()


def test_the_modelspec_hash_is_that_of_the_payload(sd: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(random_adapter(sd, seed=1), path)
    data = path.read_bytes()
    payload = data[8 + int.from_bytes(data[:8], "little") :]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(payload).hexdigest()}"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.trigger_phrase"] == "sks"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusers_makes_the_same_image_from_our_file(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    mixed = random_adapter(base, seed=1, rank=4, alpha=2.0)
    other = random_adapter(base, seed=2, rank=2, alpha=7.0)
    layers = {p: (mixed if i % 2 else other).layers[p] for i, p in enumerate(mixed.layers)}
    adapter = Adapter(layers=layers, metadata=mixed.metadata)
    path = tmp_path / "mixed.safetensors"
    save_adapter(adapter, path)
    config = GenerateConfig(prompt="a cat", num_inference_steps=3, guidance_scale=3.0, seed=5)
    blend = Blend(entries=(WeightedAdapter(adapter=load_adapter(path)),))
    ours = generate(base, [config], blend)[0].image
    bare = generate(base, [config])[0].image

    theirs = load_base(str(base.folder), device=torch.device("cpu"))
    with quiet_libraries():
        theirs.pipe.load_lora_weights(str(path))
    image = generate(theirs, [config])[0].image
    assert largest_difference(ours, image) <= 1
    assert largest_difference(ours, bare) > 8


def largest_difference(a: object, b: object) -> int:
    x, y = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in (a, b))  # type: ignore[attr-defined]
    return int((x - y).abs().max())


def test_alpha_of_peft_metadata_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "peft.safetensors"
    factors = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}
    second = {key.replace("unet.a", "unet.b"): value.clone() for key, value in factors.items()}
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"^b": 1.0}}
    save_file({**factors, **second}, path, metadata={"lora_adapter_metadata": json.dumps(config)})
    layers = load_adapter(path).layers
    assert (layers["unet.a"].scale, layers["unet.b"].scale) == (4.0, 0.5)


def test_without_any_alpha_the_scale_is_one(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}, path)
    assert load_adapter(path).layers["unet.a"].scale == 1.0


def test_a_tensor_that_is_not_understood_refuses_the_file(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"unet.a.lora_A.weight": torch.ones(2, 3), "lora_unet_b.alpha": torch.ones(1)}, path)
    with pytest.raises(AdapterFormatError, match=r"2 of 2 keys .*first: 'lora_unet_b\.alpha'"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("tensors", "header", "words"),
    [
        (
            {"unet.lora_A.weight": torch.ones(2, 3), "unet.lora_B.weight": torch.ones(4, 2)},
            {},
            "none of its 2 keys is in a known format",
        ),
        ({"unet.a.lora_A.weight": torch.tensor(1.0), "unet.a.lora_B.weight": torch.tensor(1.0)}, {}, "dimensions"),
        ({"unet.a.lora_A.weight": torch.ones(0, 3), "unet.a.lora_B.weight": torch.ones(4, 0)}, {}, "is empty"),
        (
            {"unet.a.lora_A.weight": torch.ones(2, 3).int(), "unet.a.lora_B.weight": torch.ones(4, 2).int()},
            {},
            "floating",
        ),
        ({}, {"unet.lora_alpha": "x"}, "cannot be applied"),
        ({}, {"unet.lora_alpha": None}, "cannot be applied"),
        ({}, {"unet.lora_alpha": float("nan")}, "alpha is nan"),
        ({}, {"unet.alpha_pattern": ["a"]}, "cannot be applied"),
        ({}, {"unet.alpha_pattern": {"(": 1}}, "cannot be applied"),
        ({}, {"unet.use_dora": True}, "use_dora"),
        ({}, [1], "not a JSON object"),
    ],
)
def test_odd_files_are_refused_in_words(tmp_path: Path, tensors: dict, header: object, words: str) -> None:
    path = tmp_path / "odd.safetensors"
    good = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors or good, path, metadata={"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(AdapterFormatError, match=words):
        load_adapter(path)


def test_edited_tensors_of_our_own_file_are_noticed(sd: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(random_adapter(sd, seed=1), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFormatError, match="damaged or was edited"):
        load_adapter(path)


def test_half_a_pair_refuses_the_file(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({"unet.a.lora_A.weight": torch.ones(2, 3)}, path)
    with pytest.raises(AdapterFormatError, match=r"unet\.a: has only some of its 2 factors \(missing: up\)"):
        load_adapter(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no tensors here", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFormatError, match="not a safetensors file"):
        load_adapter(path)


def test_nan_is_neither_written_nor_read(tmp_path: Path) -> None:
    layer = LoRALayer(down=torch.full((1, 2), float("nan")), up=torch.ones(2, 1), alpha=1.0)
    with pytest.raises(AdapterFormatError, match="1 of 2 tensors hold NaN"):
        save_adapter(Adapter(layers={"unet.a": layer}), tmp_path / "nan.safetensors")
    assert not list(tmp_path.iterdir())
    save_file({"unet.a.lora_A.weight": layer.down, "unet.a.lora_B.weight": layer.up}, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterFormatError, match="hold NaN or infinity"):
        load_adapter(tmp_path / "nan.safetensors")


def test_a_place_that_cannot_be_written_is_an_output_error(sd: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        save_adapter(random_adapter(sd, seed=1), tmp_path / "file" / "a.safetensors")
