"""Losses per sample: MSE bit for bit, the others against their formulas in float64."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.training.diffusion.losses import (
    compute_target,
    elementwise_loss,
    huber_delta,
    loss_weight,
    masked_mean,
    sample_losses,
)
from lora_diffusion.training.diffusion.schedule import Predicts, alphas_cumprod_of, noisy_latent

EPSILON = 2**-24
"""Largest relative error of one rounding to float32."""
BETAS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHAS: Tensor = BETAS.alphas_cumprod
LOSSES = ("mse", "huber", "smooth-l1", "l1")
SCHEDULES = ("constant", "snr", "exponential")
WEIGHTINGS = ("none", "min-snr", "debiased")


def objective(**settings: object) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(settings)


def losses_of(
    predicted: Tensor,
    target: Tensor,
    config: ObjectiveConfig,
    *,
    timestep: Tensor | None = None,
    predicts: Predicts = "epsilon",
    mask: Tensor | None = None,
    alphas: Tensor = ALPHAS,
) -> Tensor:
    return sample_losses(
        predicted,
        target,
        timestep=torch.full((len(predicted),), 500) if timestep is None else timestep,
        alphas_cumprod=alphas,
        predicts=predicts,
        config=config,
        mask=mask,
    )


def pair(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return drawn[0], drawn[1]


@given(seed=st.integers(0, 2**32), n=st.integers(1, 4), height=st.integers(1, 9), half=st.booleans())
def test_default_loss_is_the_mean_squared_error_bit_for_bit(seed: int, n: int, height: int, half: bool) -> None:
    predicted, target = pair(seed, (n, 4, height, 7), torch.float16 if half else torch.float32)
    expected = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    assert torch.equal(losses_of(predicted, target, ObjectiveConfig()), expected)


def huber_in_float64(difference: Tensor, delta: Tensor) -> Tensor:
    turn = delta.double().view(-1, 1, 1, 1)
    return 2 * turn * ((difference.double().square() + turn.square()).sqrt() - turn)


@given(seed=st.integers(0, 2**32), low=st.floats(-3, 1), size=st.floats(-2, 2))
def test_huber_losses_equal_their_formulas(seed: int, low: float, size: float) -> None:
    difference = pair(seed, (3, 4, 5, 5))[0] * 10**size
    delta = torch.tensor([10**low, 0.1, 1.0])
    expected = huber_in_float64(difference, delta)
    # the formula itself loses 2^-52 of delta^2 in its subtraction; ours takes about eight roundings of float32
    slack = {"rtol": 8 * EPSILON, "atol": 1e-14 * 100}
    huber = elementwise_loss(difference, delta, objective(loss="huber"))
    torch.testing.assert_close(huber.double(), expected, **slack)
    smooth = elementwise_loss(difference, delta, objective(loss="smooth-l1"))
    expected = expected / delta.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(smooth.double(), expected, rtol=9 * EPSILON, atol=1e-12 / 10**low)


def test_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    delta, config = torch.ones(1), objective(loss="huber")
    near = torch.full((1, 1, 1, 1), 1e-5)
    # the next term of the series is d^2 / 4 relative; a subtraction in float32 would give 0 here
    torch.testing.assert_close(elementwise_loss(near, delta, config), near.square(), rtol=1e-6, atol=0)
    far = torch.full((1, 1, 1, 1), 1e6)
    torch.testing.assert_close(elementwise_loss(far, delta, config), 2 * (far - 1), rtol=1e-6, atol=0)
    assert torch.equal(elementwise_loss(-far, delta, objective(loss="l1")), far)


@given(delta=st.floats(0.01, 2))
def test_huber_deltas_equal_their_formulas(delta: float) -> None:
    steps, alphas = torch.arange(1000), ALPHAS.double()
    sigmas = ((1 - alphas) / alphas).sqrt()
    formulas = {
        "constant": torch.full((1000,), delta, dtype=torch.float64),
        "snr": (1 - delta) / (1 + sigmas).square() + delta,
        "exponential": torch.exp(steps.double() * math.log(delta) / 1000),
    }
    for schedule, expected in formulas.items():
        found = huber_delta(steps, ALPHAS, objective(huber_schedule=schedule, huber_delta=delta))
        # up to ten roundings; those of log(delta) count log(delta) times, at most 5
        torch.testing.assert_close(found.double(), expected, rtol=16 * EPSILON, atol=16 * EPSILON)


@given(seed=st.integers(0, 2**32), error=st.floats(0.1, 10), share=st.floats(0.05, 1))
def test_small_mask_has_the_weight_of_a_whole_picture(seed: int, error: float, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(2, 1, 6, 6, generator=rng) < share).float()
    mask[:, :, 0, 0] = 1
    target = torch.randn(2, 4, 6, 6, generator=rng)
    wrong_elsewhere = target + error * mask + 100 * (1 - mask)
    losses = losses_of(wrong_elsewhere, target, ObjectiveConfig(), mask=mask)
    # target + error is rounded at the size of target, below 6
    torch.testing.assert_close(losses, torch.full((2,), error**2), rtol=64 * EPSILON * (1 + 12 / error), atol=0)


@given(seed=st.integers(0, 2**32), factor=st.floats(0.01, 1))
def test_masked_mean_is_a_weighted_mean(seed: int, factor: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    values, mask = torch.rand(3, 4, 5, 6, generator=rng), torch.rand(3, 1, 5, 6, generator=rng) + 0.01
    expected = (values.double() * mask.double()).sum((1, 2, 3)) / (4 * mask.double().sum((1, 2, 3)))
    slack = {"rtol": 64 * EPSILON, "atol": 0}  # sums of 120 positive values
    torch.testing.assert_close(masked_mean(values, mask).double(), expected, **slack)
    torch.testing.assert_close(masked_mean(values, factor * mask).double(), expected, **slack)
    everywhere = masked_mean(values, torch.ones(3, 1, 5, 6))
    torch.testing.assert_close(everywhere, masked_mean(values, None), **slack)


def test_empty_mask_has_zero_loss_and_zero_gradient() -> None:
    predicted, target = pair(0, (2, 4, 3, 3))
    predicted.requires_grad_()
    mask = torch.ones(2, 1, 3, 3)
    mask[1] = 0
    losses = losses_of(predicted, target, ObjectiveConfig(), mask=mask)
    losses.sum().backward()
    assert float(losses.detach()[1]) == 0 and predicted.grad is not None
    assert bool((predicted.grad[1] == 0).all()) and bool((predicted.grad[0] != 0).any())


@given(exponent=st.floats(-6, 6), gamma=st.floats(0.5, 20))
def test_weights_equal_their_formulas(exponent: float, gamma: float) -> None:
    ratio = torch.tensor([10**exponent])
    exact = ratio.double()
    formulas: dict[tuple[str, Predicts], Tensor] = {
        ("min-snr", "epsilon"): exact.clamp(max=gamma) / exact,
        ("min-snr", "v_prediction"): exact.clamp(max=gamma) / (exact + 1),
        ("debiased", "epsilon"): 1 / exact.sqrt(),
        ("debiased", "v_prediction"): exact.sqrt() / (exact + 1),
    }
    for (weighting, predicts), expected in formulas.items():
        config = objective(weighting=weighting, min_snr_gamma=gamma)
        found = loss_weight(ratio, predicts, config).double()
        torch.testing.assert_close(found, expected, rtol=8 * EPSILON, atol=0)


def test_weights_at_pure_noise_are_the_limits() -> None:
    zero, tiny = torch.zeros(1), torch.full((1,), 1e-30)
    for weighting, predicts in (("min-snr", "epsilon"), ("min-snr", "v_prediction"), ("debiased", "v_prediction")):
        config = objective(weighting=weighting)
        at, near = loss_weight(zero, predicts, config), loss_weight(tiny, predicts, config)
        torch.testing.assert_close(at, near, rtol=0, atol=1e-14)
    assert float(loss_weight(zero, "epsilon", objective(weighting="min-snr"))) == 1


@given(seed=st.integers(0, 2**32), step=st.integers(0, 800))
def test_weighted_loss_does_not_depend_on_the_parametrization(seed: int, step: int) -> None:
    latent, noise = (x.double() for x in pair(seed, (1, 4, 6, 6)))
    epsilon_hat = noise + pair(seed + 1, (1, 4, 6, 6))[0]
    timestep, alphas = torch.tensor([step]), ALPHAS.double()
    noisy = noisy_latent(latent, noise, timestep, alphas)
    signal, sigma = alphas[step].sqrt(), (1 - alphas[step]).sqrt()
    v_hat = (epsilon_hat - sigma * noisy) / signal
    v = compute_target(latent, noise, timestep, alphas, "v_prediction")
    for weighting in ("min-snr", "debiased"):
        config = objective(weighting=weighting)
        by_noise = losses_of(epsilon_hat, noise, config, timestep=timestep)
        by_v = losses_of(v_hat, v, config, timestep=timestep, predicts="v_prediction")
        # predictions are rounded to float32 at a size of up to 6 / signal, errors are about 1 / signal
        torch.testing.assert_close(by_v, by_noise, rtol=64 * EPSILON, atol=0)


@pytest.mark.parametrize(("loss", "schedule", "weighting"), [*itertools.product(LOSSES, SCHEDULES, WEIGHTINGS)])
def test_losses_and_gradients_at_pure_noise_are_finite(loss: str, schedule: str, weighting: str) -> None:
    config = objective(loss=loss, huber_schedule=schedule, weighting=weighting, zero_terminal_snr=True)
    alphas = alphas_cumprod_of(ALPHAS, config)
    predicted, target = pair(3, (3, 4, 3, 3))
    predicted[0, 0, 0, 0] = target[0, 0, 0, 0]  # a distance of 0, where the derivative may not exist
    predicted.requires_grad_()
    timestep = torch.tensor([999, 998, 0])
    losses = losses_of(predicted, target, config, timestep=timestep, predicts="v_prediction", alphas=alphas)
    losses.sum().backward()
    assert predicted.grad is not None
    assert bool(losses.isfinite().all()) and bool(predicted.grad.isfinite().all())
    at_pure_noise = float(losses.detach()[0])
    assert at_pure_noise > 0 if weighting == "none" else at_pure_noise == 0
