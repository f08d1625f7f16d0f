"""Extraction of layers from weights: optimal errors, thresholds, the randomized SVD, and agreement with LyCORIS."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.utils import extract_conv, extract_linear
from torch import Tensor

from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.reduce.extract import Approximation, approximate_layers, extract_layers
from lora_diffusion.algebra.reduce.resize import CompressionReport
from lora_diffusion.algebra.svd.randomized_svd import Sketch, randomized_spectrum
from lora_diffusion.algebra.svd.rank_selection import select_rank
from lora_diffusion.algebra.svd.svd import dense_spectrum
from lora_diffusion.config.combine import RankRule
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError
from tests.helpers.extraction import PATH, product

EXACT = Approximation(rule=RankRule(rank=4))
SHAPES = [(20, 14), (14, 20), (12, 5, 3, 3)]


def random_weight(shape: tuple[int, ...], seed: int = 0, decay: float = 0.7) -> Tensor:
    """Return a float32 weight with random singular vectors and geometrically decreasing singular values."""
    rng = torch.Generator().manual_seed(seed)
    out, inputs = shape[0], math.prod(shape[1:])
    side = min(out, inputs)
    left = torch.linalg.qr(torch.randn(out, side, generator=rng, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(inputs, side, generator=rng, dtype=torch.float64))[0]
    values = decay ** torch.arange(side, dtype=torch.float64)
    return (left * values @ right.T).reshape(shape).float()


def approximate(weight: Tensor, config: Approximation) -> tuple[LoRALayer, CompressionReport]:
    found = approximate_layers([(PATH, weight)], config)
    return found.layers[PATH], found.report


@settings(max_examples=15)
@given(shape=st.sampled_from(SHAPES), rank=st.integers(1, 14), seed=st.integers(0, 99))
def test_extracted_layer_is_the_best_of_its_rank(shape: tuple[int, ...], rank: int, seed: int) -> None:
    """By Eckart and Young, the error is the norm of the truncated singular values, up to float32 rounding.

    The error of a backward stable decomposition is a small multiple of size * epsilon * largest singular value.
    """
    base, weight = random_weight(shape, seed + 100), random_weight(shape, seed)
    found = extract_layers([(PATH, base, base + weight)], Approximation(rule=RankRule(rank=rank)))
    delta = (base + weight).double() - base.double()
    tail = torch.linalg.svdvals(delta.flatten(1))[rank:].square().sum().sqrt()
    rounding = min(delta.flatten(1).shape) * torch.finfo(torch.float32).eps * float(delta.norm())
    assert found.report.total.lost == pytest.approx(float(tail), abs=rounding)
    assert float((product(found.layers[PATH]) - delta.flatten(1)).norm()) == pytest.approx(float(tail), abs=rounding)


@settings(max_examples=20)
@given(
    shape=st.sampled_from(SHAPES),
    rank=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    sketch=st.sampled_from([None, Sketch(oversampling=1, power_iterations=0)]),
)
def test_reported_error_is_the_actual_error(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype, sketch: Sketch | None
) -> None:
    weight = random_weight(shape, rank)
    layer, report = approximate(weight, Approximation(rule=RankRule(rank=rank), sketch=sketch, dtype=dtype))
    assert {layer.up.dtype, layer.down.dtype} == {dtype}
    true = float((weight.double().flatten(1) - product(layer)).norm())
    assert report.modules[PATH].lost == pytest.approx(true, abs=1e-6)
    assert report.modules[PATH].norm == pytest.approx(float(weight.double().norm()), rel=1e-9)
    assert report.total.relative == pytest.approx(true / float(weight.double().norm()), abs=1e-6)


def test_large_entries_are_not_clamped() -> None:
    weight = torch.zeros(40, 30)
    weight[3, 7] = 5.0
    layer, report = approximate(weight, Approximation(rule=RankRule(keep=0.99)))
    assert layer.rank == 1
    torch.testing.assert_close(layer.delta(), weight)
    assert report.total.lost < 1e-6


@settings(max_examples=20)
@given(threshold=st.floats(1e-4, 2), seed=st.integers(0, 99))
def test_threshold_keeps_the_values_that_reach_it(threshold: float, seed: int) -> None:
    weight = random_weight((18, 13), seed)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    if np.abs(values - threshold).min() > 1e-6:
        assert approximate(weight, Approximation(rule=RankRule(threshold=threshold)))[0].rank == max(
            1, (values > threshold).sum()
        )


@settings(max_examples=20)
@given(quantile=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_quantile_keeps_the_values_above_it(quantile: float, seed: int) -> None:
    weight = random_weight((18, 13), seed)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    line = np.quantile(values, quantile)
    if np.abs(values - line).min() > 1e-6:
        assert approximate(weight, Approximation(rule=RankRule(quantile=quantile)))[0].rank == (values > line).sum()


def test_thresholds_and_quantiles_respect_at_most_and_numerical_zeros() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, 1e-9, 1e-10])
    assert select_rank(RankRule(threshold=1.5), values) == 3
    assert select_rank(RankRule(threshold=1.5, at_most=2), values) == 2
    assert select_rank(RankRule(threshold=1e-12), values) == 4
    assert select_rank(RankRule(threshold=9.0), values) == 1
    assert select_rank(RankRule(quantile=0.5), values) == 2
    assert str(RankRule(threshold=0.5, at_most=2)) == "threshold 0.5, at most 2"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 1.0, "quantile": 0.5}, "not by threshold and quantile"),
        ({"threshold": 0.0}, "'threshold' is 0.0: input should be greater than 0"),
        ({"threshold": math.nan}, "'threshold' is nan"),
        ({"quantile": 1.0}, "'quantile' is 1.0: input should be less than 1"),
        ({"quantile": 0.5, "at_most": 0}, "'at_most' is 0"),
    ],
)
def test_invalid_rank_rules_are_rejected(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RankRule, values, source="test")


@settings(max_examples=10)
@given(shape=st.sampled_from([(160, 120), (120, 170), (130, 20, 3, 3)]), seed=st.integers(0, 99))
def test_randomized_svd_agrees_with_the_exact_one_on_a_decaying_spectrum(shape: tuple[int, ...], seed: int) -> None:
    """Singular values agree within 1e-3 and the error is at most 0.1 % above the optimum.

    The worst cases over all inputs that can be generated here are 4e-4 and 0.011 %.
    """
    weight = random_weight(shape, seed, decay=0.9)
    exact, sketched = dense_spectrum(weight), randomized_spectrum(weight, 12, Sketch(seed=seed))
    torch.testing.assert_close(sketched.values[:12], exact.values[:12], rtol=1e-3, atol=0)
    (best, best_report), (_, report) = (
        approximate(weight, Approximation(rule=RankRule(rank=12), sketch=s)) for s in (None, Sketch(seed=seed))
    )
    assert best.rank == 12
    assert best_report.total.lost * (1 - 1e-6) <= report.total.lost <= best_report.total.lost * (1 + 1e-3)
    kept = sketched.values[:12].double().square().sum()
    assert report.total.lost == pytest.approx(float((weight.double().square().sum() - kept).sqrt()), rel=1e-4)


def test_randomized_svd_is_seeded_and_used_only_for_low_ranks() -> None:
    weight = random_weight((160, 120), decay=0.97)

    def up(rank: int, sketch: Sketch | None) -> Tensor:
        return approximate(weight, Approximation(rule=RankRule(rank=rank), sketch=sketch))[0].up

    assert torch.equal(up(12, Sketch(seed=1)), up(12, Sketch(seed=1)))
    assert not torch.equal(up(12, Sketch(seed=1)), up(12, Sketch(seed=2)))
    assert not torch.equal(up(20, Sketch()), up(20, None))
    assert torch.equal(up(21, Sketch()), up(21, None))
    with pytest.raises(ConfigError, match=r"needs a fixed rank, not keep 0\.9"):
        Approximation(rule=RankRule(keep=0.9), sketch=Sketch())


@pytest.mark.parametrize("mode", ["fixed", "threshold"])
@pytest.mark.parametrize("shape", [(24, 18), (24, 9, 3, 3)])
def test_extraction_matches_lycoris(shape: tuple[int, ...], mode: str) -> None:
    """LyCORIS' `ratio` and `quantile` have other definitions, so only `fixed` and `threshold` are compared."""
    weight = random_weight(shape)
    theirs = extract_linear if len(shape) == 2 else extract_conv
    (down, up, _), kind = theirs(weight, mode=mode, mode_param=5 if mode == "fixed" else 0.2)
    assert kind == "low rank"
    layer, _ = approximate(weight, Approximation(rule=RankRule(rank=5) if mode == "fixed" else RankRule(threshold=0.2)))
    assert layer.down.shape == down.shape
    assert layer.up.shape == up.shape
    torch.testing.assert_close(layer.delta().flatten(1), up.flatten(1) @ down.flatten(1), atol=1e-5, rtol=1e-4)


def test_factors_beyond_float16_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"unet\.conv_in: a LoRA factor is beyond the range of torch\.float16"):
        approximate(torch.full((4, 4), 1e12), replace(EXACT, dtype=torch.float16))
