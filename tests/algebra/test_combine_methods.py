"""Consensus methods, compared with the papers' formulas on dense float64 matrices."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter, blend_sum
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.layers import LoHaLayer, LoRALayer
from lora_diffusion.algebra.combine.core_space import build_core_space, build_knots_space, layer_from_core
from lora_diffusion.algebra.combine.methods import METHODS, combine_by_consensus
from lora_diffusion.algebra.combine.ties_dare_della import dare, della, magnitude, median, slerp, ties
from lora_diffusion.algebra.combine.ziplora import solve_coefficients, zip_coefficients, zip_layers
from lora_diffusion.config.combine import ConsensusConfig, ConsensusMethod
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError, FamilyMismatchError

PATH = "unet.mid_block.attentions.0.proj_in"
OTHER = "unet.mid_block.attentions.0.proj_out"
ALL = get_args(ConsensusMethod)
SEEDED = ("dare", "della")

Rule = Callable[[Tensor, Tensor], Tensor]


def lora(seed: int, *, rank: int = 3, out: int = 12, inner: tuple[int, ...] = (10,), alpha: float = 2.0) -> LoRALayer:
    rng = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=rng)
    return LoRALayer(down=torch.randn(rank, *inner, generator=rng), up=up, alpha=alpha)


def delta64(layer: LoRALayer) -> Tensor:
    """Return alpha / rank * up @ down as a dense float64 matrix, kernels flattened."""
    return layer.alpha / layer.rank * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))


def stack_of(seed: int, count: int = 3, shape: tuple[int, int] = (4, 5)) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def blend_of(layers: Sequence[LoRALayer], weights: Sequence[float]) -> Blend:
    adapters = (Adapter(layers={PATH: layer}) for layer in layers)
    return Blend(entries=tuple(WeightedAdapter(adapter=a, weight=w) for a, w in zip(adapters, weights, strict=True)))


def merged(blend: Blend, config: ConsensusConfig) -> Tensor:
    """Return the merged delta of one module as a float64 matrix, kernels flattened."""
    layer = combine_by_consensus(blend, config, AdapterMetadata()).layers[PATH]
    assert isinstance(layer, LoRALayer)
    return delta64(layer)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> bool:
    """Return whether two matrices differ by at most this fraction of the second one's norm."""
    return bool((first.double() - second.double()).norm() <= tolerance * second.double().norm() + 1e-12)


# The papers' formulas, entry by entry or on dense matrices


def paper_trim(matrix: Tensor, density: float) -> Tensor:
    kept = max(1, round(density * matrix.numel()))
    order = sorted(range(matrix.numel()), key=lambda i: -abs(float(matrix.flatten()[i])))
    flat = torch.zeros(matrix.numel(), dtype=torch.float64)
    for index in order[:kept]:
        flat[index] = matrix.flatten()[index]
    return flat.reshape(matrix.shape)


def paper_elect(matrices: Sequence[Tensor], disjoint: str) -> Tensor:
    result = torch.zeros_like(matrices[0])
    for place in itertools.product(*map(range, result.shape)):
        values = [float(matrix[place]) for matrix in matrices]
        positive, negative = sum(v for v in values if v > 0), sum(-v for v in values if v < 0)
        agreeing = [v for v in values if v != 0 and (v > 0) == (positive > negative)]
        total = sum(agreeing)
        result[place] = total / max(1, len(agreeing)) if disjoint == "mean" else total
    return result


def paper_ties(matrices: Sequence[Tensor], weights: Sequence[float], density: float, disjoint: str) -> Tensor:
    return paper_elect([w * paper_trim(m, density) for m, w in zip(matrices, weights, strict=True)], disjoint)


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


# TIES, DARE, DELLA, magnitude, KnOTS


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    density=st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0]),
    weights=st.tuples(*[st.floats(-2, 2).map(lambda x: round(x, 2))] * 3),
    disjoint=st.sampled_from(["mean", "sum"]),
)
def test_ties_matches_the_paper(seed: int, density: float, weights: tuple[float, ...], disjoint: str) -> None:
    stack = stack_of(seed)
    result = ties(stack, torch.tensor(weights).double(), density=density, disjoint=disjoint)
    assert close(result, paper_ties(list(stack), torch.tensor(weights).tolist(), density, disjoint), 1e-10)


def test_ties_at_density_1_with_equal_signs_is_the_mean_or_sum() -> None:
    stack, weights = stack_of(1).abs(), torch.tensor([0.5, 1.0, 2.0]).double()
    total = torch.einsum("n,npq->pq", weights, stack)
    assert close(ties(stack, weights, density=1, disjoint="sum"), total, 1e-12)
    assert close(ties(stack, weights, density=1, disjoint="mean"), total / 3, 1e-12)


def test_ties_matches_peft_at_weights_1() -> None:
    from peft.utils.merge_utils import ties as peft_ties

    stack, ones = stack_of(3), torch.ones(3).double()
    assert close(ties(stack, ones, density=0.5, disjoint="mean"), peft_ties(list(stack), ones, 0.5), 1e-12)


def test_magnitude_pruning_keeps_the_largest() -> None:
    stack, weights = stack_of(4), torch.tensor([0.5, -1.0, 2.0]).double()
    pruned = sum((w * paper_trim(m, 0.3) for m, w in zip(stack, weights, strict=True)), torch.zeros(4, 5))
    assert close(magnitude(stack, weights, density=0.3), pruned, 1e-12)


@pytest.mark.parametrize("method", ["magnitude", "dare"])
def test_density_1_gives_the_weighted_sum_for_any_alpha_and_rank(method: ConsensusMethod) -> None:
    blend = blend_of([lora(1, rank=2, alpha=8.0), lora(2, rank=5, alpha=1.0), lora(3)], [0.7, -0.4, 1.0])
    result = merged(blend, ConsensusConfig(method=method, density=1.0))
    assert close(result, sum_deltas(blend_sum(blend).layers[PATH]))


def test_dare_rescales_kept_entries_and_its_expectation_is_the_sum() -> None:
    stack, weights, density, draws = stack_of(5), torch.tensor([0.5, 1.0, -1.0]).double(), 0.4, 2000
    single = dare(stack[:1], torch.ones(1).double(), density=density, generator=generator(0))
    assert bool(((single == 0) | (single == stack[0] / density)).all())
    mean = sum(dare(stack, weights, density=density, generator=generator(seed)) for seed in range(draws)) / draws
    variance = ((weights[:, None, None] * stack).square() * (1 - density) / density).sum(0)
    total = torch.einsum("n,npq->pq", weights, stack)
    assert float(((mean - total) / (variance / draws).sqrt()).abs().max()) < 4.5


def test_della_keeps_entries_with_the_probabilities_of_the_paper() -> None:
    stack, density, spread, draws = stack_of(6, count=1), 0.6, 0.5, 2000
    one, count = torch.ones(1).double(), stack.numel()
    epsilon = 2 * spread * min(density, 1 - density)
    order = sorted(range(count), key=lambda i: -abs(float(stack.flatten()[i])))
    keep = torch.empty(count).double()
    for rank, index in enumerate(order):  # rank 0 is the largest, which is dropped least
        keep[index] = 1 - ((1 - density) - epsilon / 2 + epsilon * rank / (count - 1))
    results = torch.stack(
        [
            della(stack, one, density=density, spread=spread, disjoint="sum", generator=generator(seed)).flatten()
            for seed in range(draws)
        ]
    )
    kept = results != 0
    assert torch.allclose(results[kept], (stack.flatten() / keep).expand_as(results)[kept])
    error = (kept.double().mean(0) - keep) / (keep * (1 - keep) / draws).sqrt()
    assert float(error.abs().max()) < 4.5
    assert math.isclose(float(keep.mean()), density)


def test_della_elects_signs_like_ties() -> None:
    stack, weights = stack_of(7), torch.tensor([0.5, 1.0, -2.0]).double()
    result = della(stack, weights, density=1, spread=0.3, disjoint="mean", generator=generator(1))
    assert torch.equal(result, ties(stack, weights, density=1, disjoint="mean"))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), density=st.sampled_from([0.2, 0.5, 1.0]))
def test_knots_is_ties_on_the_svd_of_concatenated_deltas(seed: int, density: float) -> None:
    layers, weights = [lora(seed, rank=2), lora(seed + 1, rank=4), lora(seed + 2, alpha=9.0)], [0.5, 1.0, -0.7]
    left, values, right = torch.linalg.svd(torch.cat([delta64(x) for x in layers], dim=1), full_matrices=False)
    rank = int((values > 1e-9 * values[0]).sum())
    parts = [values[:rank, None] * part for part in right[:rank].split(10, dim=1)]
    blend = blend_of(layers, weights)
    result = merged(blend, ConsensusConfig(method="knots", density=density))
    assert close(result, left[:, :rank] @ paper_ties(parts, weights, density, "mean"))


def test_knots_space_is_lossless() -> None:
    layers = [lora(1, inner=(3, 3, 3)), lora(2, rank=5, inner=(3, 3, 3))]
    space = build_knots_space(layers)
    back = layer_from_core(space, space.cores.sum(0))
    assert back.weight_shape == (12, 3, 3, 3)
    assert close(delta64(back), delta64(layers[0]) + delta64(layers[1]))


# The geometric median and SLERP


def distance_sum(point: Tensor, points: Tensor) -> float:
    return float((points - point).flatten(1).norm(dim=1).sum())


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(3, 6))
def test_median_minimizes_the_sum_of_distances(seed: int, count: int) -> None:
    points, ones = stack_of(seed, count), torch.ones(count).double()
    found = median(points, ones)
    gaps = (points - found).flatten(1).norm(dim=1)
    unit = (points - found)[gaps > 0] / gaps[gaps > 0, None, None]
    assert float(unit.sum(0).norm()) <= int((gaps == 0).sum()) + 1e-6  # gradient zero, or a point that holds it
    least = distance_sum(found, points)
    for step in stack_of(seed + 1, 20):
        assert distance_sum(found + 0.01 * step, points) >= least


def test_median_of_points_on_a_line_is_the_middle_one() -> None:
    direction = stack_of(1, 1)
    points = torch.tensor([0.0, 1.0, 100.0]).double()[:, None, None] * direction
    assert close(median(points, torch.ones(3).double()), points[1], 1e-12)


def test_median_of_two_equal_points_and_a_third_and_of_two_points() -> None:
    first, second = stack_of(2, 2)
    assert torch.equal(median(torch.stack([first, second, first]), torch.ones(3).double()), first)
    assert close(median(torch.stack([first, second]), torch.ones(2).double()), (first + second) / 2, 1e-12)


def test_median_in_core_space_is_that_of_the_dense_deltas() -> None:
    layers = [lora(1), lora(2), lora(3)]
    result = merged(blend_of(layers, [0.8, 1.0, 0.6]), ConsensusConfig(method="median"))
    points = torch.stack([w * delta64(layer) for w, layer in zip([0.8, 1.0, 0.6], layers, strict=True)])
    assert close(result, median(points, torch.ones(3).double()))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.95))
def test_slerp_of_a_matrix_with_itself_is_itself(seed: int, share: float) -> None:
    layer = lora(seed)
    result = merged(blend_of([layer, layer], [1 - share, share]), ConsensusConfig(method="slerp"))
    assert close(result, delta64(layer))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), first=st.floats(0.1, 2), second=st.floats(0.1, 2))
def test_slerp_follows_the_arc_and_keeps_the_norm(seed: int, first: float, second: float) -> None:
    layers = [lora(seed), lora(seed + 1, rank=5)]
    x, y = map(delta64, layers)
    result = merged(blend_of(layers, [first, second]), ConsensusConfig(method="slerp"))
    assert math.isclose(float(result.norm()), float(first * x.norm() + second * y.norm()), rel_tol=1e-5)
    between = angle_of(x, y)
    assert math.isclose(angle_of(x, result), between * second / (first + second), rel_tol=1e-3)
    assert math.isclose(angle_of(result, y), between * first / (first + second), rel_tol=1e-3)


def angle_of(first: Tensor, second: Tensor) -> float:
    return math.acos(float((first * second).sum() / first.norm() / second.norm()))


@pytest.mark.parametrize("factor", [1 + 1e-9, -1.0, 0.0])
def test_slerp_without_an_arc_is_the_weighted_sum(factor: float) -> None:
    first = stack_of(1, 1)[0]
    weights = torch.tensor([0.3, 0.7]).double()
    result = slerp(torch.stack([first, factor * first]), weights)
    assert close(result, (0.3 + 0.7 * factor) * first, 1e-6)


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


# NP-LoRA and ZipLoRA


def test_project_removes_the_main_directions_of_the_style() -> None:
    subject, style = lora(1), lora(2)
    values, right = torch.linalg.svd(delta64(style), full_matrices=False)[1:]
    held = values.square().cumsum(0) / values.square().sum()
    main = right[: int((held < 0.95).sum()) + 1]
    expected = 0.8 * (delta64(subject) - 0.75 * delta64(subject) @ main.T @ main) + 0.6 * delta64(style)
    result = merged(blend_of([subject, style], [0.8, 0.6]), ConsensusConfig(method="np-lora", projection_strength=3.0))
    assert close(result, expected)


def zip_loss(m1: Tensor, m2: Tensor, d1: Tensor, d2: Tensor, penalty: float) -> Tensor:
    """Return the objective that the coefficients of ZipLoRA minimize, for each column."""
    overlap = ((m1 * d1) * (m2 * d2)).sum(0).abs()
    return ((m1 - 1) * d1).square().sum(0) + ((m2 - 1) * d2).square().sum(0) + 2 * penalty * overlap


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    penalty=st.sampled_from([0.0, 0.3, 0.9, 0.99]),
    weights=st.tuples(*[st.sampled_from([-1.0, 0.2, 1.0, 3.0])] * 2),
)
def test_zip_coefficients_minimize_the_objective(seed: int, penalty: float, weights: tuple[float, float]) -> None:
    layers = (lora(seed, rank=2, out=3), lora(seed + 1, rank=1, out=3))
    d1, d2 = (w * delta64(layer) for w, layer in zip(weights, layers, strict=True))
    m1, m2 = zip_coefficients((weights[0], layers[0]), (weights[1], layers[1]), penalty)
    assert bool(((m1 >= 0) & (m1 <= 1) & (m2 >= 0) & (m2 <= 1)).all())
    own1, own2, shared = d1.square().sum(0), d2.square().sum(0), penalty * (d1 * d2).sum(0).abs()
    inside = (m1 > 0) & (m2 > 0)
    assert torch.allclose((own1 * m1 + shared * m2)[inside], own1[inside])
    assert torch.allclose((shared * m1 + own2 * m2)[inside], own2[inside])
    least = zip_loss(m1, m2, d1, d2, penalty)
    grid = torch.linspace(0, 2, 21).double()
    for x, y in itertools.product(grid, grid):
        assert bool((zip_loss(x, y, d1, d2, penalty) >= least - 1e-9).all())


def test_zip_does_not_change_orthogonal_columns() -> None:
    first, second = lora(1, rank=2), lora(2, rank=2)
    first, second = (
        replace(x, up=torch.cat([x.up[:6] * (i == 0), x.up[6:] * (i == 1)])) for i, x in enumerate((first, second))
    )
    result = zip_layers([(0.7, first), (-0.4, second)], 0.9)
    assert close(delta64(result), 0.7 * delta64(first) - 0.4 * delta64(second), 1e-6)
    assert result.rank == 4


def test_zip_of_an_adapter_with_itself() -> None:
    result = merged(blend_of([lora(1), lora(1)], [1.0, 1.0]), ConsensusConfig(method="ziplora", penalty=0.9))
    assert close(result, 2 / 1.9 * delta64(lora(1)))


def test_zip_without_penalty_is_the_sum() -> None:
    first, second = lora(1), lora(2, rank=1, alpha=4.0)
    result = merged(blend_of([first, second], [0.7, -0.4]), ConsensusConfig(method="ziplora", penalty=0.0))
    assert close(result, 0.7 * delta64(first) - 0.4 * delta64(second))


def test_zip_drops_the_much_shorter_of_two_parallel_columns() -> None:
    one = torch.ones(1).double()
    first, second = solve_coefficients(one, 100 * one, 9 * one)  # lengths 1 and 10, cosine 1, penalty 0.9
    assert (float(first), float(second)) == (0.0, 1.0)
    assert [float(x) for x in solve_coefficients(0 * one, one, 0 * one)] == [1.0, 1.0]  # a column of zeros


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
