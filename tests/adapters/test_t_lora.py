"""Truncation of T-LoRA layers, and its use by patches from step to step."""

import gc
import weakref

import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.adapters.t_lora import truncate_layer
from lora_diffusion.inference.in_place import weight_patch
from lora_diffusion.models.load import Base
from tests.conftest import random_adapter


def make_layer() -> LoRALayer:
    return LoRALayer(down=torch.randn(4, 5), up=torch.randn(6, 4), alpha=2.0)


def test_a_truncation_has_the_first_directions_at_the_same_scale() -> None:
    layer = make_layer()
    cut = truncate_layer(layer, 3)
    torch.testing.assert_close(cut.delta(), layer.scale * layer.up[:, :3] @ layer.down[:3])
    assert truncate_layer(layer, 4) is layer


def test_truncations_of_one_layer_to_one_rank_are_one_object_and_end_with_the_layer() -> None:
    layer, other = make_layer(), make_layer()
    cut = truncate_layer(layer, 3)
    assert cut is truncate_layer(layer, 3)
    assert cut is not truncate_layer(layer, 2)
    assert cut is not truncate_layer(other, 3)
    doubled = layer.with_factors({"up": 2 * layer.up})
    assert torch.equal(truncate_layer(doubled, 3).up, 2 * cut.up)
    remaining = weakref.ref(cut)
    del layer, cut
    gc.collect()
    assert remaining() is None


def test_a_patch_writes_only_when_the_rank_changes(sd: Base) -> None:
    plain = random_adapter(sd, seed=1)
    adapter = Adapter(layers=plain.layers, metadata=AdapterMetadata(family=sd.family.name, min_rank=2))
    blend = Blend(entries=(WeightedAdapter(adapter=adapter),))
    with weight_patch(sd) as patch:
        applied = []
        for index in (0, 1, 5):
            patch.apply(blend, DenoisingStep(index=index, total=10))
            applied.append(dict(patch.applied))
    assert all(applied[1][name] is terms for name, terms in applied[0].items())
    assert all(applied[2][name] is not terms for name, terms in applied[0].items())
