"""Algebraic laws of blends, on random factors and random tiny bases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash
from lora_diffusion.adapters.blend import Blend, WeightedAdapter, blend_sum
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.combine.exact_sum import combine
from lora_diffusion.errors import AdapterFormatError, ConfigError, FamilyMismatchError
from lora_diffusion.inference.in_place import blended_weights, weight_at
from lora_diffusion.models.load import Base
from tests.conftest import random_adapter

PATH = "unet.mid_block.attentions.0.proj_in"
weights = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def layers(draw: st.DrawFn, out: int = 12, inner: tuple[int, ...] = (10,)) -> LoRALayer:
    rank = draw(st.integers(1, 6))
    alpha = draw(st.sampled_from([0.5, 1.0, 3.0, 8.0, 16.0]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=rng)
    return LoRALayer(down=torch.randn(rank, *inner, generator=rng), up=up, alpha=alpha)


@st.composite
def blends(draw: st.DrawFn) -> Blend:
    """Up to four one-layer adapters of mixed ranks and alphas, linear or convolution."""
    inner = draw(st.sampled_from([(10,), (5, 3, 3)]))
    terms = draw(st.lists(st.tuples(layers(inner=inner), weights), min_size=1, max_size=4))
    return Blend(entries=tuple(WeightedAdapter(adapter=Adapter(layers={PATH: layer}), weight=w) for layer, w in terms))


def reference_sum(blend: Blend) -> Tensor:
    """Compute the definition in float64: sum of weight * alpha / rank * up @ down."""
    total = torch.zeros(blend.entries[0].adapter.layers[PATH].weight_shape, dtype=torch.float64)
    for entry in blend.entries:
        x = entry.adapter.layers[PATH]
        product = torch.einsum("or,r...->o...", x.up.double().flatten(1), x.down.double())
        total += entry.weight * (x.alpha / x.rank) * product
    return total


def delta_at(blend: Blend, path: str) -> Tensor:
    return sum_deltas(blend_sum(blend).layers[path])


@given(blends())
def test_a_blend_is_the_sum_of_weighted_deltas(blend: Blend) -> None:
    if not blend.active:
        assert blend_sum(blend).names == ()
        return
    assert torch.allclose(delta_at(blend, PATH).double(), reference_sum(blend), atol=1e-4, rtol=1e-5)


@given(blends())
def test_combining_preserves_the_delta_for_mixed_ranks_and_alphas(blend: Blend) -> None:
    one = combine(blend, AdapterMetadata())
    if not blend.active:
        assert not one.layers
        return
    layer = one.layers[PATH]
    assert layer.rank == sum(e.adapter.layers[PATH].rank for e in blend.active)
    assert torch.allclose(layer.delta().double(), reference_sum(blend), atol=1e-4, rtol=1e-5)


@given(blends(), st.randoms(use_true_random=False))
def test_the_result_is_bitwise_independent_of_the_order_of_adapters(blend: Blend, random: object) -> None:
    entries = list(blend.entries)
    random.shuffle(entries)  # type: ignore[attr-defined]
    if blend.active:
        assert torch.equal(delta_at(blend, PATH), delta_at(Blend(entries=tuple(entries)), PATH))


@given(layers(), st.floats(0.25, 4))
def test_moving_scale_from_alpha_to_up_preserves_the_delta(layer: LoRALayer, factor: float) -> None:
    rescaled = LoRALayer(down=layer.down, up=layer.up * factor, alpha=layer.alpha / factor)
    assert torch.allclose(rescaled.delta(), layer.delta(), atol=1e-4, rtol=1e-4)


@given(layers())
def test_an_adapter_of_weight_zero_has_no_effect(layer: LoRALayer) -> None:
    other = Adapter(layers={PATH: LoRALayer(down=torch.ones(1, 10), up=torch.ones(12, 1), alpha=1.0)})
    adapter = Adapter(layers={PATH: layer})
    alone = Blend(entries=(WeightedAdapter(adapter=adapter, weight=0.7),))
    with_zero = Blend(entries=(*alone.entries, WeightedAdapter(adapter=other, weight=0.0)))
    assert torch.equal(delta_at(alone, PATH), delta_at(with_zero, PATH))


def test_the_hash_depends_on_tensors_and_alpha_but_not_on_metadata() -> None:
    layer = LoRALayer(down=torch.ones(2, 4), up=torch.ones(3, 2), alpha=2.0)
    plain = Adapter(layers={PATH: layer})
    named = Adapter(layers={PATH: layer}, metadata=AdapterMetadata(name="x"))
    other_alpha = Adapter(layers={PATH: LoRALayer(down=layer.down, up=layer.up, alpha=4.0)})
    assert adapter_hash(plain) == adapter_hash(named) != adapter_hash(other_alpha)


def test_factors_of_mismatched_shapes_raise() -> None:
    with pytest.raises(AdapterFormatError, match=r"invalid factor shapes \(down \(4, 4\), up \(3, 2\)\)"):
        LoRALayer(down=torch.ones(4, 4), up=torch.ones(3, 2), alpha=1.0)


def test_a_weight_that_is_not_finite_raises(sd: Base) -> None:
    with pytest.raises(ConfigError, match="is not a finite number"):
        Blend(entries=(WeightedAdapter(adapter=random_adapter(sd, seed=1), weight=float("nan")),))


def two_adapters(base: Base, first: float, second: float) -> Blend:
    one = random_adapter(base, seed=1, rank=4, alpha=2.0, unet=("all",), text_encoders=("all",))
    other = random_adapter(base, seed=2, rank=3, alpha=9.0)
    return Blend(entries=(WeightedAdapter(adapter=one, weight=first), WeightedAdapter(adapter=other, weight=second)))


@settings(max_examples=8)
@given(first=weights, second=weights)
def test_undo_restores_the_base_bit_for_bit(sd: Base, first: float, second: float) -> None:
    before = {path: weight_at(sd, path).clone() for path in sd.paths}
    with blended_weights(sd, two_adapters(sd, first, second)):
        pass
    assert all(torch.equal(before[path], weight_at(sd, path)) for path in sd.paths)


def test_undo_runs_after_an_exception(sd: Base, untouched: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="inside"), blended_weights(sd, two_adapters(sd, 1.0, -0.5)):
        assert not torch.equal(weight_at(sd, PATH), untouched[PATH])
        raise RuntimeError("inside")


def test_blended_weights_are_base_plus_delta(sd: Base, untouched: dict[str, Tensor]) -> None:
    blend = two_adapters(sd, 0.8, -0.4)
    with blended_weights(sd, blend):
        for path, terms in blend_sum(blend).layers.items():
            expected = untouched[path].double() + sum_deltas(terms).double().reshape(untouched[path].shape)
            assert torch.allclose(weight_at(sd, path).double(), expected, atol=1e-6, rtol=1e-6)


def test_a_blend_needs_no_more_flops_than_the_base(sd: Base) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            sd.pipe.unet(torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 77, 32))
        return counter.get_total_flops()

    bare = flops()
    with blended_weights(sd, two_adapters(sd, 1.0, 1.0)):
        assert flops() == bare


def test_an_adapter_of_another_family_raises_before_weights_change(
    sd: Base, sdxl: Base, untouched: dict[str, Tensor]
) -> None:
    blend = Blend(entries=(WeightedAdapter(adapter=random_adapter(sdxl, seed=1)),))
    with (
        pytest.raises(FamilyMismatchError, match=r"adapter for tiny SDXL, but .* is tiny SD"),
        blended_weights(sd, blend),
    ):
        pass
    assert torch.equal(weight_at(sd, PATH), untouched[PATH])


def test_a_second_blend_into_the_same_base_raises(sd: Base, untouched: dict[str, Tensor]) -> None:
    with blended_weights(sd, two_adapters(sd, 1.0, 0.0)):
        with (
            pytest.raises(ConfigError, match="a blend is applied to the weights of this base already"),
            blended_weights(sd, two_adapters(sd, 0.5, 0.5)),
        ):
            pass
        assert not torch.equal(weight_at(sd, PATH), untouched[PATH])


def test_the_hash_is_independent_of_the_memory_format() -> None:
    up = torch.randn(6, 2, 1, 1).half()
    down = torch.randn(2, 3, 3, 3).half()
    layers = [
        LoRALayer(down=down.contiguous(memory_format=f), up=up.contiguous(memory_format=f), alpha=1.0)
        for f in (torch.contiguous_format, torch.channels_last)
    ]
    first, second = (adapter_hash(Adapter(layers={PATH: layer})) for layer in layers)
    assert first == second


def test_layers_without_a_module_are_counted_and_reported(sd: Base) -> None:
    layer = LoRALayer(down=torch.ones(1, 4), up=torch.ones(4, 1), alpha=1.0)
    adapter = Adapter(layers={"unet.nowhere.to_q": layer, PATH: layer})
    with (
        pytest.raises(FamilyMismatchError, match=r"1 of 2 layers match no module .* first: unet\.nowhere\.to_q"),
        blended_weights(sd, Blend(entries=(WeightedAdapter(adapter=adapter),))),
    ):
        pass


def test_two_families_in_one_blend_raise(sd: Base, sdxl: Base) -> None:
    adapters = (random_adapter(sd, seed=1), random_adapter(sdxl, seed=1))
    with pytest.raises(FamilyMismatchError, match="tiny SD and tiny SDXL in one blend"):
        Blend(entries=tuple(WeightedAdapter(adapter=a) for a in adapters))
