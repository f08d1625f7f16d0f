"""`Blend.of` with loaded adapters; paths are tested in `tests/formats/test_weighted.py`."""

import pytest
import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.config.preset import BlendWeight
from lora_diffusion.errors import ConfigError, FamilyMismatchError

PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def make_adapter(name: str, family: str = "sd1") -> Adapter:
    layer = LoRALayer(down=torch.full((2, 48), float(len(name))), up=torch.ones(48, 2), alpha=2.0)
    return Adapter(layers={PATH: layer}, metadata=AdapterMetadata(name=name, family=family))


def test_blend_of_accepts_a_mapping_or_pairs_of_adapters() -> None:
    neon, gloop, weight = make_adapter("neon"), make_adapter("gloop"), BlendWeight(value=0.5, components={"unet": 1.0})
    blend = Blend.of({neon: 0.8, gloop: weight})
    assert [(entry.adapter, entry.weight) for entry in blend.entries] == [(neon, 0.8), (gloop, weight)]
    twice = Blend.of([(neon, 1.0), (neon, -1.0)])
    assert [(entry.adapter, entry.weight) for entry in twice.entries] == [(neon, 1.0), (neon, -1.0)]
    assert Blend.of({}).entries == ()


def test_blend_of_refuses_invalid_weights_and_mixed_families() -> None:
    with pytest.raises(ConfigError, match="is not a finite number"):
        Blend.of({make_adapter("neon"): float("inf")})
    with pytest.raises(FamilyMismatchError, match="in one blend"):
        Blend.of({make_adapter("neon"): 1.0, make_adapter("gloop", "sdxl"): 1.0})
