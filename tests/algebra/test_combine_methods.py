"""Consensus methods: properties that all of them share, and Core Space."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoHaLayer, LoRALayer
from lora_diffusion.algebra.combine.core_space import build_core_space, build_knots_space, layer_from_core
from lora_diffusion.algebra.combine.methods import METHODS, combine_by_consensus
from lora_diffusion.algebra.combine.ties_dare_della import dare, della, magnitude, median, slerp, ties
from lora_diffusion.config.combine import ConsensusConfig, ConsensusMethod
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from tests.helpers.consensus_cases import ALL, PATH, SEEDED, blend_of, close, delta64, generator, lora, merged, stack_of

OTHER = "unet.mid_block.attentions.0.proj_out"

Rule = Callable[[Tensor, Tensor], Tensor]


# Core Space


@settings(max_examples=20)
@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    inner=st.sampled_from([(10,), (3, 3, 3), (5, 1, 1)]),
    seed=st.integers(0, 1000),
)
def test_core_space_is_lossless(ranks: list[int], inner: tuple[int, ...], seed: int) -> None:
    layers = [lora(seed + i, rank=rank, inner=inner, alpha=1.5 + i) for i, rank in enumerate(ranks)]
    space = build_core_space(layers)
    for layer, core in zip(layers, space.cores, strict=True):
        back = layer_from_core(space, core)
        assert back.weight_shape == layer.weight_shape
        assert back.rank <= layer.rank
        assert close(delta64(back), delta64(layer))
    together = torch.stack([delta64(layer) for layer in layers]).sum(0)
    assert close(delta64(layer_from_core(space, space.cores.sum(0))), together)
    p, q = space.cores.shape[1:]
    assert p == torch.linalg.matrix_rank(torch.cat([delta64(x) for x in layers], dim=1))
    assert q == torch.linalg.matrix_rank(torch.cat([delta64(x) for x in layers], dim=0))


def test_the_bases_of_core_space_are_orthonormal() -> None:
    space = build_core_space([lora(1, rank=2), lora(2, rank=4)])
    assert space.right is not None
    assert close(space.left.T @ space.left, torch.eye(6, dtype=torch.float64), 1e-12)
    assert close(space.right @ space.right.T, torch.eye(6, dtype=torch.float64), 1e-12)


def test_core_space_of_equal_layers_has_the_size_of_one() -> None:
    space = build_core_space([lora(1), replace(lora(1), alpha=5.0)])
    assert space.cores.shape == (2, 3, 3)


@pytest.mark.parametrize("method", [method for method in ALL if method not in SEEDED])
def test_result_depends_on_deltas_but_not_on_their_factorization(method: ConsensusMethod) -> None:
    mixing = torch.randn(3, 3, generator=generator(9)).double() + 2 * torch.eye(3)
    first, second = lora(1), lora(2)
    other = LoRALayer(
        up=(first.up.double() @ mixing), down=torch.linalg.solve(mixing, first.down.double()), alpha=first.alpha
    )
    config = ConsensusConfig(method=method)
    blends = [blend_of([layer, second], [0.8, 0.6]) for layer in (first, other)]
    expected, result = (merged(blend, config) for blend in blends)
    assert close(result, expected, 1e-4)


def test_knots_space_is_lossless() -> None:
    layers = [lora(1, inner=(3, 3, 3)), lora(2, rank=5, inner=(3, 3, 3))]
    space = build_knots_space(layers)
    back = layer_from_core(space, space.cores.sum(0))
    assert back.weight_shape == (12, 3, 3, 3)
    assert close(delta64(back), delta64(layers[0]) + delta64(layers[1]))


def test_median_in_core_space_is_that_of_the_dense_deltas() -> None:
    layers = [lora(1), lora(2), lora(3)]
    result = merged(blend_of(layers, [0.8, 1.0, 0.6]), ConsensusConfig(method="median"))
    points = torch.stack([w * delta64(layer) for w, layer in zip([0.8, 1.0, 0.6], layers, strict=True)])
    assert close(result, median(points, torch.ones(3).double()))


# Properties of all methods


RULES: dict[str, Rule] = {
    "ties": lambda x, w: ties(x, w, density=0.4, disjoint="mean"),
    "ties sum": lambda x, w: ties(x, w, density=0.4, disjoint="sum"),
    "magnitude": lambda x, w: magnitude(x, w, density=0.4),
    "median": median,
    "slerp": lambda x, w: slerp(x[:2], w[:2]),
    "dare": lambda x, w: dare(x, w, density=0.4, generator=generator(3)),
    "della": lambda x, w: della(x, w, density=0.4, spread=0.3, disjoint="mean", generator=generator(3)),
}


@pytest.mark.parametrize("name", ["ties", "ties sum", "magnitude", "median"])
def test_order_of_matrices_does_not_matter(name: str) -> None:
    stack, weights = stack_of(8, 4), torch.tensor([0.5, 1.0, -2.0, 0.3]).double()
    expected = RULES[name](stack, weights)
    for order in itertools.permutations(range(4)):
        assert close(RULES[name](stack[list(order)], weights[list(order)]), expected, 1e-8)


@pytest.mark.parametrize("name", RULES)
def test_methods_are_homogeneous_in_the_weights(name: str) -> None:
    stack, weights = stack_of(9), torch.tensor([0.5, 1.0, -2.0]).double()
    assert close(RULES[name](stack, 3 * weights), 3 * RULES[name](stack, weights), 1e-8)


@pytest.mark.parametrize("name", RULES)
def test_negative_weight_negates_the_matrix(name: str) -> None:
    stack, signs = stack_of(10), torch.tensor([1.0, -1.0, 1.0]).double()
    weights = torch.tensor([0.5, 1.0, 2.0]).double()
    expected = RULES[name](signs[:, None, None] * stack, weights)
    assert close(RULES[name](stack, signs * weights), expected, 1e-8)


@pytest.mark.parametrize("name", ["magnitude", "dare"])
def test_sums_are_linear_in_each_weight(name: str) -> None:
    stack, rule = stack_of(11), RULES[name]
    first, second = torch.tensor([0.5, 1.0, -2.0]).double(), torch.tensor([0.1, -3.0, 0.7]).double()
    assert close(rule(stack, first + second), rule(stack, first) + rule(stack, second), 1e-10)


def two_modules(seed: int, *paths: str) -> Adapter:
    return Adapter(layers={path: lora(seed + i) for i, path in enumerate(paths)})


def entries(*adapters: Adapter) -> Blend:
    return Blend(entries=tuple(WeightedAdapter(adapter=a, weight=w) for a, w in zip(adapters, (0.8, 0.6), strict=True)))


@pytest.mark.parametrize("method", [method for method in ALL if method != "np-lora"])
def test_order_of_adapters_does_not_change_the_hash(method: ConsensusMethod) -> None:
    blend = entries(two_modules(1, PATH, OTHER), two_modules(5, PATH, OTHER))
    config = ConsensusConfig(method=method)
    one, reversed_order = (
        combine_by_consensus(b, config, AdapterMetadata()) for b in (blend, Blend(entries=blend.entries[::-1]))
    )
    assert one.hash == reversed_order.hash


@pytest.mark.parametrize("method", SEEDED)
def test_a_seed_gives_the_same_again_and_another_seed_does_not(method: ConsensusMethod) -> None:
    blend = entries(two_modules(1, PATH, OTHER), two_modules(5, PATH, OTHER))
    made = [
        combine_by_consensus(blend, ConsensusConfig(method=method, seed=seed), AdapterMetadata()).hash
        for seed in (7, 7, 8)
    ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("method", SEEDED)
def test_modules_draw_different_numbers(method: ConsensusMethod) -> None:
    one, two = (Adapter(layers=dict.fromkeys((PATH, OTHER), lora(seed))) for seed in (1, 2))
    layers = combine_by_consensus(entries(one, two), ConsensusConfig(method=method), AdapterMetadata()).layers
    assert not torch.allclose(layers[PATH].delta(), layers[OTHER].delta())


@pytest.mark.parametrize("method", ALL)
def test_module_of_a_single_adapter_is_scaled_by_its_weight(method: ConsensusMethod) -> None:
    one, two = two_modules(1, PATH, OTHER), two_modules(5, PATH)
    result = combine_by_consensus(entries(one, two), ConsensusConfig(method=method), AdapterMetadata(name="x"))
    assert result.metadata.name == "x"
    assert set(result.layers) == {PATH, OTHER}
    assert torch.allclose(result.layers[OTHER].delta(), 0.8 * one.layers[OTHER].delta(), atol=1e-6)


@pytest.mark.parametrize("method", ALL)
def test_convolutions_keep_their_kernels(method: ConsensusMethod) -> None:
    layers = [lora(1, inner=(4, 3, 3)), lora(2, rank=2, inner=(4, 3, 3))]
    result = combine_by_consensus(
        blend_of(layers, [1.0, 0.5]), ConsensusConfig(method=method), AdapterMetadata()
    ).layers[PATH]
    assert result.weight_shape == (12, 4, 3, 3)
    assert bool(result.delta().isfinite().all())
    assert float(result.delta().norm()) > 0


def test_biases_are_merged_like_a_column() -> None:
    bias = torch.randn(12, generator=generator(1))
    one, two = (Adapter(layers={PATH: lora(1)}, biases={PATH: b}) for b in (bias, -2 * bias))
    blend = entries(one, two)
    result = combine_by_consensus(blend, ConsensusConfig(method="ties", density=1.0), AdapterMetadata()).biases[PATH]
    assert torch.allclose(result, 0.6 * -2 * bias, atol=1e-5)  # the sum of masses is on the second's side
    single = combine_by_consensus(
        entries(one, two_modules(5, OTHER)), ConsensusConfig(method="median"), AdapterMetadata()
    )
    assert torch.allclose(single.biases[PATH], 0.8 * bias)


# Errors


def test_every_method_is_implemented() -> None:
    assert {*METHODS, "np-lora"} == set(ALL)


@pytest.mark.parametrize("method", ALL)
def test_layers_other_than_plain_lora_are_rejected(method: ConsensusMethod) -> None:
    loha = LoHaLayer(
        w1_a=torch.ones(12, 1), w1_b=torch.ones(1, 10), w2_a=torch.ones(12, 1), w2_b=torch.ones(1, 10), alpha=1.0
    )
    unsupported = Adapter(layers={PATH: loha}, metadata=AdapterMetadata(name="odd"))
    blend = entries(Adapter(layers={PATH: lora(1)}), unsupported)
    message = rf"odd: {method} needs plain LoRA layers, but 1 of 1 are LoHa \(first: {PATH}\); convert the adapter with"
    with pytest.raises(ConfigError, match=message):
        combine_by_consensus(blend, ConsensusConfig(method=method), AdapterMetadata())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "tie"}, "'method' is 'tie': input should be 'ties', 'dare'"),
        ({"density": 0.0}, "'density' is 0.0: input should be greater than 0"),
        ({"density": 1.5}, "'density' is 1.5"),
        ({"density": math.nan}, "'density' is nan"),
        ({"method": "dare", "seed": -1}, "'seed' is -1: input should be greater than or equal to 0"),
        ({"method": "dare", "seed": 0.5}, "'seed' is 0.5: input should be a valid integer"),
        ({"method": "della", "spread": 1.0}, "'spread' is 1.0: input should be less than 1"),
        ({"disjoint": "max"}, "'disjoint' is 'max': input should be 'mean' or 'sum'"),
        ({"method": "ziplora", "penalty": 1.0}, "'penalty' is 1.0"),
        ({"method": "np-lora", "projection_strength": math.inf}, "'projection_strength' is inf"),
        (
            {"method": "slerp", "density": 0.3},
            "density is a setting of ties, dare, della, knots, magnitude; the method slerp",
        ),
        ({"seed": 3}, "seed is a setting of dare, della; the method ties does not use it"),
    ],
)
def test_invalid_settings_are_rejected(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ConsensusConfig, {"method": "ties", **setting}, source="test")


def test_unsupported_numbers_of_adapters_are_rejected() -> None:
    blend = blend_of([lora(1), lora(2), lora(3)], [1.0, 1.0, 1.0])
    for method in ("slerp", "ziplora"):
        with pytest.raises(ConfigError, match=f"{method} merges two adapters, but this blend has 3"):
            combine_by_consensus(blend, ConsensusConfig(method=method), AdapterMetadata())
    with pytest.raises(ConfigError, match="np-lora needs two or more adapters, a subject followed by styles"):
        combine_by_consensus(blend_of([lora(1)], [1.0]), ConsensusConfig(method="np-lora"), AdapterMetadata())


def test_adapters_of_different_shapes_are_rejected() -> None:
    with pytest.raises(FamilyMismatchError, match="combine only adapters for the same base model"):
        combine_by_consensus(
            blend_of([lora(1), lora(2, out=13)], [1.0, 1.0]), ConsensusConfig(method="ties"), AdapterMetadata()
        )
