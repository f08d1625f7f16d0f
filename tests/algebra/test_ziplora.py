"""ZipLoRA and NP-LoRA: the coefficients minimize the objective, and main directions are removed."""

import itertools
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.algebra.combine.ziplora import solve_coefficients, zip_coefficients, zip_layers
from lora_diffusion.config.combine import ConsensusConfig
from tests.helpers.consensus_cases import blend_of, close, delta64, lora, merged

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
