"""TIES, DARE, DELLA, KnOTS, medians and slerp, compared with the papers' formulas on dense float64 matrices."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.blend import blend_sum
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.algebra.combine.ties_dare_della import dare, della, magnitude, median, slerp, ties
from lora_diffusion.config.combine import ConsensusConfig, ConsensusMethod
from tests.helpers.consensus_cases import PATH, blend_of, close, delta64, generator, lora, merged, stack_of

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
