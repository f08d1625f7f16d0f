"""One-line representations of layers, adapters and blends; no representation prints tensors."""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_diffusion
from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter, blend_sum
from lora_diffusion.adapters.factor_stack import stack_factors
from lora_diffusion.adapters.layers import DoRALayer, FullLayer, Layer, LoHaLayer, LoKrLayer, LoRALayer
from lora_diffusion.algebra.svd.svd import Spectrum
from lora_diffusion.config.preset import BlendWeight, Region, Schedule
from lora_diffusion.formats.adapters.load import load_meta_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.adapters.parsed import ParsedFile
from lora_diffusion.inference.parallel import ParallelDelta
from lora_diffusion.models.text_encoding import TextContext
from lora_diffusion.models.textual_inversion import LearnedToken

ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def lora(rank: int = 8, alpha: float = 8.0, size: int = 320) -> LoRALayer:
    return LoRALayer(down=torch.ones(rank, size), up=torch.ones(size, rank), alpha=alpha)


def neon() -> Adapter:
    metadata = AdapterMetadata(name="neon", family="sd1")
    return Adapter(layers={ATTENTION: lora(), TEXT: lora()}, metadata=metadata)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lora(), "LoRALayer(rank=8, alpha=8.0, in=320, out=320, float32)"),
        (
            LoRALayer(down=torch.ones(4, 6, 3, 3).half(), up=torch.ones(5, 4, 1, 1).half(), alpha=2.0),
            "LoRALayer(rank=4, alpha=2.0, in=6, out=5, kernel=3x3, float16)",
        ),
        (
            LoRALayer(down=torch.ones(4, 6), up=torch.ones(5, 4).bfloat16(), alpha=0.5),
            "LoRALayer(rank=4, alpha=0.5, in=6, out=5, float32/bfloat16)",
        ),
        (
            LoHaLayer(
                w1_a=torch.ones(5, 2), w1_b=torch.ones(2, 6), w2_a=torch.ones(5, 2), w2_b=torch.ones(2, 6), alpha=1.0
            ),
            "LoHaLayer(rank=2, alpha=1.0, in=6, out=5, float32)",
        ),
        (
            LoKrLayer(w1=torch.ones(2, 3), w2=torch.ones(5, 7), alpha=1.0),
            "LoKrLayer(rank=1, alpha=1.0, in=21, out=10, float32)",
        ),
        (FullLayer(diff=torch.ones(5, 6, 3, 3)), "FullLayer(in=6, out=5, kernel=3x3, float32)"),
        (FullLayer(diff=torch.ones(320)), "FullLayer(size=320, float32)"),
        (
            DoRALayer(inner=lora(), magnitude=torch.ones(320, 1)),
            "DoRALayer(inner=LoRA, rank=8, alpha=8.0, in=320, out=320, float32)",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Layer) else "",
)
def test_a_layer_shows_rank_alpha_sizes_and_dtype(layer: Layer, expected: str) -> None:
    assert repr(layer) == expected


def test_an_adapter_shows_name_family_modules_rank_components_and_hash() -> None:
    adapter = neon()
    assert repr(adapter) == (f"Adapter('neon', sd1, 2 modules, rank 8, unet+text_encoder, sha256:{adapter.hash[:8]})")


def test_an_adapter_shows_other_layer_kinds_and_a_range_of_ranks() -> None:
    layers = {ATTENTION: lora(rank=4), TEXT: lora(rank=16), "unet.conv_norm_out": FullLayer(diff=torch.ones(4))}
    adapter = Adapter(layers=layers)
    assert repr(adapter) == (f"Adapter(3 modules, LoRA+norm, rank 4-16, unet+text_encoder, sha256:{adapter.hash[:8]})")


def test_an_adapter_of_textual_inversion_shows_its_tokens() -> None:
    adapter = Adapter(layers={}, tokens={"<cat>": {"text_encoder": torch.ones(2, 4)}})
    assert repr(adapter) == f"Adapter(1 token, text_encoder, sha256:{adapter.hash[:8]})"
    assert repr(Adapter(layers={})) == f"Adapter(0 modules, sha256:{Adapter(layers={}).hash[:8]})"


def test_an_adapter_without_values_shows_no_hash(tmp_path: Path) -> None:
    save_adapter(neon(), tmp_path / "neon.safetensors")
    adapter = load_meta_adapter(tmp_path / "neon.safetensors")
    assert repr(adapter) == "Adapter('neon', sd1, 2 modules, rank 8, unet+text_encoder)"
    assert repr(adapter.layers[ATTENTION]) == "LoRALayer(rank=8, alpha=8.0, in=320, out=320, float32)"
    meta = LoRALayer(down=torch.ones(8, 320, device="meta"), up=torch.ones(320, 8, device="meta"), alpha=8.0)
    assert repr(Adapter(layers={ATTENTION: meta})) == "Adapter(1 module, rank 8, unet)"


def test_a_blend_shows_names_and_weights() -> None:
    gloop = WeightedAdapter(
        adapter=Adapter(layers={ATTENTION: lora()}), weight=-0.5, path=Path("sets/gloop.safetensors")
    )
    blend = Blend(entries=(WeightedAdapter(adapter=neon(), weight=0.8), gloop))
    assert repr(blend) == "Blend(neon x 0.8, gloop x -0.5)"
    assert repr(gloop) == "WeightedAdapter(gloop x -0.5)"
    assert repr(Blend()) == "Blend()"
    assert repr(blend_sum(blend)) == "BlendSum(2 weights, 0 biases)"


def test_a_blend_names_further_settings_of_a_weight() -> None:
    weight = BlendWeight(value=0.7, blocks="MIDD", schedule=Schedule(points=((0.0, 1.0), (0.5, 0.0))))
    entry = WeightedAdapter(adapter=neon(), weight=weight, region=Region(box=(0.0, 0.0, 0.5, 1.0)))
    assert repr(Blend(entries=(entry,))) == "Blend(neon x 0.7 (blocks, schedule, region))"
    plain = WeightedAdapter(adapter=neon(), weight=BlendWeight(value=0.7))
    assert repr(plain) == "WeightedAdapter(neon x 0.7)"


def test_metadata_shows_the_fields_that_identify_the_adapter() -> None:
    training = {"steps": 400, "settings": dict.fromkeys(map(str, range(100)))}
    metadata = AdapterMetadata(
        name="neon", family="sd1", trigger_words=("zwx",), training=training, description="a long text"
    )
    assert (
        repr(metadata) == "AdapterMetadata(name='neon', family='sd1', trigger_words=('zwx',), source_format='native')"
    )


@pytest.mark.parametrize(
    "value",
    [
        stack_factors([lora(), lora()]),
        Spectrum(left=torch.ones(320, 4), values=torch.ones(4), right=torch.ones(4, 320), shape=(320, 320)),
        ParallelDelta(down=torch.ones(1, 4, 320), up=torch.ones(1, 320, 4), bias=torch.ones(1, 320)),
        LearnedToken(
            placeholder_token="<cat>",
            adapter="neon",
            names=("<cat-0>",),
            embeddings={"text_encoder": torch.ones(2, 320)},
        ),
        TextContext(hidden=torch.ones(1, 77, 320), added={"time_ids": torch.ones(1, 6)}),
        ParsedFile(
            dialect="peft", layers={ATTENTION: lora()}, biases={ATTENTION: torch.ones(320)}, tokens={"<cat>": {}}
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_with_tensors_is_one_line_without_them(value: object) -> None:
    assert "tensor(" not in repr(value)
    assert "\n" not in repr(value)
    assert len(repr(value)) < 120


def library_dataclasses() -> Iterator[type[Any]]:
    for info in pkgutil.walk_packages(lora_diffusion.__path__, "lora_diffusion."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == info.name:
                    yield value


def test_no_dataclass_of_the_library_prints_tensors() -> None:
    printed = [
        f"{kind.__module__}.{kind.__name__}.{field.name}"
        for kind in library_dataclasses()
        if hasattr(kind.__repr__, "__wrapped__")  # generated by `dataclass`, not written by hand
        for field in dataclasses.fields(kind)
        if field.repr and re.search(r"\b(Tensor|Parameter|Token)\b(?!Info)", str(field.type))
        if not str(field.type).startswith(("Callable", "collections.abc.Callable"))
    ]
    assert printed == []
