"""Spectra, subspace similarity, amplification and overlap against dense float64 formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.layers import FullLayer, Layer, LoHaLayer, LoKrLayer, LoRALayer
from lora_diffusion.algebra.metrics.amplification import measure_amplification
from lora_diffusion.algebra.metrics.overlap import Overlap, measure_overlap, sum_overlaps
from lora_diffusion.algebra.metrics.spectra import (
    effective_rank,
    energy_shares,
    measure_spectrum,
    rank_holding,
    stable_rank,
    summarize_block,
)
from lora_diffusion.algebra.metrics.subspace_similarity import (
    grassmann_distance,
    leading_directions,
    mean_grid,
    random_similarity,
    subspace_similarity,
)
from lora_diffusion.algebra.svd.svd import spectrum_of, truncate_spectrum

seeds = st.integers(0, 2**31)
few_examples = settings(max_examples=15)


def orthonormal_columns(dim: int, count: int, rng: torch.Generator) -> Tensor:
    """Return random orthonormal columns, (dim, count) in float64."""
    return torch.linalg.qr(torch.randn(dim, count, generator=rng, dtype=torch.float64))[0]


def lora(out: int, inner: tuple[int, ...], rank: int, seed: int, alpha: float = 3.0) -> LoRALayer:
    """Create a layer whose singular values are a factor of two apart, so that each direction is well defined."""
    rng = torch.Generator().manual_seed(seed)
    ones = [1] * (len(inner) - 1)
    up = orthonormal_columns(out, rank, rng) * 2.0 ** -torch.arange(rank)
    down = orthonormal_columns(math.prod(inner), rank, rng).T
    return LoRALayer(up=up.float().reshape(out, rank, *ones), down=down.float().reshape(rank, *inner), alpha=alpha)


def dense_delta(layer: Layer) -> Tensor:
    """Return the delta as a matrix in float64."""
    return layer.delta().double().flatten(1)


def dense_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], right[:rank].T


@st.composite
def pairs(draw: st.DrawFn) -> tuple[LoRALayer, LoRALayer]:
    """Draw two layers of one module, of different ranks and alphas, linear or convolution."""
    inner = draw(st.sampled_from([(14,), (3, 3, 3)]))
    one = lora(12, inner, draw(st.integers(1, 5)), draw(seeds), alpha=draw(st.sampled_from([0.5, 4.0])))
    return one, lora(12, inner, draw(st.integers(1, 5)), draw(seeds))


@given(st.integers(1, 40), st.floats(1e-3, 1e3))
@few_examples
def test_the_effective_and_stable_rank_of_equal_values_is_their_count(count: int, value: float) -> None:
    values = torch.full((count,), value)
    assert effective_rank(values) == pytest.approx(count, rel=1e-5)
    assert stable_rank(values) == pytest.approx(count, rel=1e-5)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.1, 10))
@few_examples
def test_ranks_lie_between_one_and_the_count_and_are_scale_invariant(numbers: list[float], factor: float) -> None:
    values = torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
    for rank in (effective_rank, stable_rank):
        assert 1 - 1e-9 <= rank(values) <= len(numbers) + 1e-9
        assert rank(values * factor) == pytest.approx(rank(values))
    p = np.array(numbers) / sum(numbers)
    assert effective_rank(values) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.01, 0.999))
@few_examples
def test_energy_shares_increase_to_one_and_rank_holding_is_the_first_to_reach_a_share(
    numbers: list[float], share: float
) -> None:
    values = torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
    shares = energy_shares(values)
    assert bool((shares >= 0).all()) and bool((shares.diff() >= 0).all()) and shares[-1] == pytest.approx(1)
    rank = rank_holding(values, share)
    assert shares[rank - 1] >= share - 1e-12
    assert rank == 1 or shares[rank - 2] < share


def test_a_zero_layer_has_rank_zero_and_no_overlap() -> None:
    nonzero = lora(6, (5,), 2, seed=1)
    zero = replace(nonzero, up=torch.zeros_like(nonzero.up))
    facts = measure_spectrum(spectrum_of([(1.0, zero)]))
    assert (facts.rank, facts.norm, facts.effective_rank, facts.stable_rank, facts.rank_99) == (0, 0, 0, 0, 0)
    both = measure_overlap(spectrum_of([(1.0, zero)]), spectrum_of([(1.0, nonzero)]))
    assert (both.cosine, both.first_share, both.second_share) == (0, 0, 0)


def test_a_block_summary_has_the_median_of_its_modules_and_the_total_norm() -> None:
    layers = [lora(6, (5,), rank, seed=rank, alpha=rank * 2.0**rank) for rank in (1, 2, 4)]
    block = summarize_block([measure_spectrum(spectrum_of([(1.0, layer)])) for layer in layers])
    norms = [float(dense_delta(layer).norm()) for layer in layers]
    assert block.norm == pytest.approx(
        float(torch.cat([dense_delta(layer).flatten() for layer in layers]).norm()), rel=1e-5
    )
    assert (block.median_norm, block.largest_norm) == pytest.approx((sorted(norms)[1], max(norms)), rel=1e-5)
    assert block.rank == 2
    assert block.values == pytest.approx((4.0, 2.0, 0.0, 0.0), abs=1e-5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LOHA = LoHaLayer(w1_a=normal(12, 2), w1_b=normal(2, 14), w2_a=normal(12, 2).exp(), w2_b=normal(2, 14).exp(), alpha=1.0)
LOKR = LoKrLayer(w1=normal(3, 2), w2_a=normal(4, 1), w2_b=normal(1, 7), alpha=1.0)
FULL = FullLayer(diff=normal(12, 14))


@pytest.mark.parametrize("layer", [LOHA, LOKR, FULL], ids=["LoHa", "LoKr", "full"])
def test_other_layer_kinds_are_measured_by_the_spectra_of_their_deltas(layer: Layer) -> None:
    values = torch.linalg.svdvals(dense_delta(layer))
    facts = measure_spectrum(spectrum_of([(1.0, layer)]))
    rank = int(torch.linalg.matrix_rank(dense_delta(layer), rtol=1e-5))
    assert facts.rank == rank
    assert facts.values == pytest.approx(values[:rank].tolist(), rel=1e-4)
    other = lora(12, (14,), 3, seed=0)
    both = measure_overlap(spectrum_of([(1.0, layer)]), spectrum_of([(1.0, other)]))
    assert both.inner == pytest.approx(float((dense_delta(layer) * dense_delta(other)).sum()), abs=1e-5)


@given(pairs())
@few_examples
def test_phi_equals_the_papers_formula_on_dense_deltas(both: tuple[LoRALayer, LoRALayer]) -> None:
    found = [leading_directions(spectrum_of([(1.0, layer)])) for layer in both]
    exact = [dense_directions(dense_delta(layer), layer.rank) for layer in both]
    for side in (0, 1):
        first, second = ((each.output, each.input)[side] for each in found)
        phi = subspace_similarity(first, second)
        assert bool(((phi >= 0) & (phi <= 1)).all())
        for i in range(1, both[0].rank + 1):
            for j in range(1, both[1].rank + 1):
                product = exact[0][side][:, :i].T @ exact[1][side][:, :j]
                assert phi[i - 1, j - 1] == pytest.approx(float(product.square().sum()) / min(i, j), abs=1e-4)


@given(st.integers(1, 6), seeds)
@few_examples
def test_an_adapter_is_similar_to_itself_and_to_its_own_truncation(rank: int, seed: int) -> None:
    spectrum = spectrum_of([(1.0, lora(12, (14,), rank, seed))])
    lower = spectrum_of([(1.0, truncate_spectrum(spectrum, max(rank - 2, 1)))])
    whole, part = leading_directions(spectrum), leading_directions(lower)
    for first, second in ((whole.output, part.output), (whole.input, part.input), (whole.input, whole.input)):
        diagonal = subspace_similarity(first, second).diagonal()
        assert torch.allclose(diagonal, torch.ones_like(diagonal), atol=1e-5)
        assert grassmann_distance(first, second) == pytest.approx(0, abs=1e-5)


@given(st.integers(1, 4), st.integers(1, 4), seeds)
@few_examples
def test_orthogonal_subspaces_have_similarity_zero(m: int, n: int, seed: int) -> None:
    basis = orthonormal_columns(10, m + n, torch.Generator().manual_seed(seed))
    first, second = basis[:, :m], basis[:, m:]
    assert float(subspace_similarity(first, second).max()) == pytest.approx(0, abs=1e-12)
    assert grassmann_distance(first, second) == pytest.approx(math.pi / 2 * math.sqrt(min(m, n)))


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.7, math.pi / 2 - 1e-9])
def test_the_distance_to_a_rotated_subspace_is_the_angle_in_every_direction(angle: float) -> None:
    basis = orthonormal_columns(12, 6, torch.Generator().manual_seed(3))
    rotated = math.cos(angle) * basis[:, :3] + math.sin(angle) * basis[:, 3:]
    assert grassmann_distance(basis[:, :3], rotated) == pytest.approx(math.sqrt(3) * angle, rel=1e-6)
    assert float(subspace_similarity(basis[:, :3], rotated)[2, 2]) == pytest.approx(math.cos(angle) ** 2)


def test_random_similarity_is_the_mean_over_random_subspaces() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = [subspace_similarity(orthonormal_columns(30, 4, rng), orthonormal_columns(30, 6, rng)) for _ in range(400)]
    expected = random_similarity(4, 6, 30)
    assert float(expected[3, 5]) == pytest.approx(6 / 30)
    assert float(expected[3, 1]) == pytest.approx(4 / 30)
    assert torch.allclose(mean_grid(drawn), expected, atol=0.012)


def test_a_mean_grid_averages_each_cell_over_the_grids_that_have_it() -> None:
    mean = mean_grid([torch.tensor([[1.0]]), torch.tensor([[0.0, 0.5], [0.25, 1.0]])])
    assert mean.tolist() == [[0.5, 0.5], [0.25, 1.0]]


@given(pairs(), seeds)
@few_examples
def test_amplification_equals_the_papers_formula_on_dense_matrices(
    both: tuple[LoRALayer, LoRALayer], seed: int
) -> None:
    layer = both[0]
    weight = torch.randn(*layer.weight_shape, generator=torch.Generator().manual_seed(seed))
    found = measure_amplification(spectrum_of([(1.0, layer)]), weight)
    W = weight.double().flatten(1)
    U, V = dense_directions(dense_delta(layer), layer.rank)
    projected = float((U.T @ W @ V).norm())
    assert found.directions == layer.rank
    assert found.projected == pytest.approx(projected, rel=1e-4, abs=1e-5)
    assert found.factor == pytest.approx(float(dense_delta(layer).norm()) / found.projected, rel=1e-4)
    top_U, top_V = dense_directions(W, layer.rank)
    assert found.own == pytest.approx(float((top_U.T @ W @ top_V).norm()))
    assert found.base_norm == pytest.approx(float(W.norm()))


def test_the_norm_in_random_directions_is_the_mean_over_random_subspaces() -> None:
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(10, 16, generator=rng, dtype=torch.float64)
    found = measure_amplification(spectrum_of([(1.0, lora(10, (16,), 3, seed=2))]), W)
    squares = [
        float((orthonormal_columns(10, 3, rng).T @ W @ orthonormal_columns(16, 3, rng)).square().sum())
        for _ in range(1000)
    ]
    assert found.random**2 == pytest.approx(np.mean(squares), rel=0.06)


def test_a_weight_without_energy_in_the_deltas_directions_has_no_factor() -> None:
    assert measure_amplification(spectrum_of([(1.0, lora(6, (5,), 2, seed=1))]), torch.zeros(6, 5)).factor is None


@given(st.lists(pairs(), min_size=1, max_size=3))
@few_examples
def test_cosine_and_shares_over_modules_equal_those_of_the_dense_deltas(
    modules: list[tuple[LoRALayer, LoRALayer]],
) -> None:
    total = sum_overlaps(measure_overlap(spectrum_of([(1.0, a)]), spectrum_of([(1.0, b)])) for a, b in modules)
    first, second = (torch.cat([dense_delta(pair[k]).flatten() for pair in modules]) for k in (0, 1))
    assert total.cosine == pytest.approx(float(first @ second / first.norm() / second.norm()), abs=1e-5)
    assert total.first_share == pytest.approx(dense_share(modules), abs=1e-5)
    assert total.second_share == pytest.approx(dense_share([(b, a) for a, b in modules]), abs=1e-5)
    assert 0 <= total.first_share <= 1 and 0 <= total.second_share <= 1


def dense_share(modules: list[tuple[LoRALayer, LoRALayer]]) -> float:
    """Compute ||P_U d1 P_V||^2 / ||d1||^2 with the projectors onto the columns and rows of the second delta."""
    inside = total = 0.0
    for a, b in modules:
        delta, other = dense_delta(a), dense_delta(b)
        held = other @ torch.linalg.pinv(other, rtol=1e-5) @ delta @ torch.linalg.pinv(other, rtol=1e-5) @ other
        inside, total = inside + float(held.square().sum()), total + float(delta.square().sum())
    return inside / total


@given(pairs(), st.floats(-3, 3).filter(lambda x: abs(x) > 0.1))
@few_examples
def test_overlap_is_symmetric_and_depends_on_the_sign_but_not_the_size_of_the_weight(
    both: tuple[LoRALayer, LoRALayer], weight: float
) -> None:
    first, second = both
    one = measure_overlap(spectrum_of([(1.0, first)]), spectrum_of([(1.0, second)]))
    other = measure_overlap(spectrum_of([(1.0, second)]), spectrum_of([(weight, first)]))
    assert other.cosine == pytest.approx(math.copysign(1, weight) * one.cosine, abs=1e-5)
    assert other.shared == pytest.approx(one.shared, abs=1e-5)
    opposite = measure_overlap(spectrum_of([(1.0, first)]), spectrum_of([(weight, first)]))
    assert (opposite.cosine, opposite.shared) == pytest.approx((math.copysign(1, weight), 1), abs=1e-5)


def test_a_module_in_only_one_adapter_adds_energy_but_no_overlap() -> None:
    first, second = (spectrum_of([(1.0, lora(6, (5,), 2, seed, alpha=2.0))]) for seed in (1, 1))
    total = sum_overlaps([measure_overlap(first, second), measure_overlap(first, None)])
    assert total.first_share == pytest.approx(0.5)
    assert total.second_share == pytest.approx(1)
    assert total.cosine == pytest.approx(math.sqrt(0.5))
    assert Overlap().cosine == 0


def test_random_adapters_share_the_energy_expected_by_chance() -> None:
    drawn = [tuple(spectrum_of([(1.0, lora(12, (14,), r, 100 + 7 * n + r))]) for r in (3, 5)) for n in range(150)]
    total = sum_overlaps(measure_overlap(*pair) for pair in drawn)
    assert total.chance == pytest.approx((5 * 5 + 3 * 3) / 2 / (12 * 14))
    assert total.shared == pytest.approx(total.chance, rel=0.15)
