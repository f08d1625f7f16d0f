"""Noise, timesteps and the noise schedule: invariants, distributions, and comparison with diffusers."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.training.diffusion.losses import compute_target
from lora_diffusion.training.diffusion.noise import draw_noise
from lora_diffusion.training.diffusion.schedule import alphas_cumprod_of, check_terminal_snr, noisy_latent, snr
from lora_diffusion.training.diffusion.timesteps import check_timesteps, draw_timestep

EPSILON = 2**-24
"""Largest relative error of one rounding to float32."""
SHAPE = (4, 24, 40)
DISTRIBUTIONS = ("uniform", "logit-normal", "content", "style")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def scheduler() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion 1 and 2."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@given(seed=st.integers(0, 2**32), height=st.integers(1, 9), width=st.integers(1, 9))
def test_default_noise_is_one_draw_of_randn(seed: int, height: int, width: int) -> None:
    shape, rng, plain = (4, height, width), seeded(seed), seeded(seed)
    noise, input_noise = draw_noise(shape, ObjectiveConfig(), rng)
    assert input_noise is noise
    assert torch.equal(noise, torch.randn(shape, generator=plain))
    assert torch.equal(rng.get_state(), plain.get_state())


@given(seed=st.integers(0, 2**32), offset=st.floats(0.01, 1))
def test_noise_offset_shifts_whole_channels_in_proportion(seed: int, offset: float) -> None:
    plain, _ = draw_noise(SHAPE, ObjectiveConfig(), seeded(seed))
    once, same = draw_noise(SHAPE, ObjectiveConfig(noise_offset=offset), seeded(seed))
    twice, _ = draw_noise(SHAPE, ObjectiveConfig(noise_offset=2 * offset), seeded(seed))
    shift = once - plain
    assert same is once
    bound = 6 * 4 * EPSILON  # values below 6, a few roundings of each
    torch.testing.assert_close(shift, shift[:, :1, :1].expand(SHAPE), rtol=0, atol=bound)
    torch.testing.assert_close(twice - plain, 2 * shift, rtol=0, atol=4 * bound)


def test_noise_offset_has_the_configured_size() -> None:
    config = ObjectiveConfig(noise_offset=0.5)
    shifts = [
        draw_noise((4, 1, 1), config, seeded(i))[0] - torch.randn(4, 1, 1, generator=seeded(i)) for i in range(500)
    ]
    measured = float(torch.stack(shifts).std())
    assert measured == pytest.approx(0.5, rel=4 / math.sqrt(2 * 2000))  # four standard errors of 2,000 draws


def test_input_perturbation_is_not_in_the_target() -> None:
    config = ObjectiveConfig(input_perturbation=0.1)
    noise, input_noise = draw_noise((4, 64, 64), config, seeded(1))
    assert torch.equal(noise, draw_noise((4, 64, 64), ObjectiveConfig(), seeded(1))[0])
    extra = (input_noise - noise).flatten()
    count = extra.numel()
    assert float(extra.std()) == pytest.approx(0.1, rel=4 / math.sqrt(2 * count))
    correlation = float(torch.corrcoef(torch.stack([extra, noise.flatten()]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(count)


def coarse_variance(discount: float, levels: int = 6) -> float:
    """Compute the mean square of the means of 8 x 8 blocks, which is 1 / 64 for Gaussian noise."""
    config = ObjectiveConfig(pyramid_discount=discount, pyramid_levels=levels)
    noises = torch.stack([draw_noise((4, 32, 32), config, seeded(i))[0] for i in range(60)])
    return float(torch.nn.functional.avg_pool2d(noises, 8).square().mean())


def test_pyramid_noise_is_coarser_with_a_higher_discount_factor() -> None:
    measured = [coarse_variance(discount) for discount in (0.0, 0.3, 0.6, 0.9)]
    assert measured[0] == pytest.approx(1 / 64, rel=4 * math.sqrt(2 / (60 * 4 * 16)))
    assert measured == sorted(measured)
    assert measured[3] > 4 * measured[0]
    assert coarse_variance(0.9, levels=1) < coarse_variance(0.9, levels=6)


@given(seed=st.integers(0, 2**32))
def test_each_pyramid_level_is_multiplied_by_the_discount(seed: int) -> None:
    """Levels 2 and 3 have weights of at most discount^2; both calls draw the same level 1."""
    one, three = (
        draw_noise((4, 32, 32), ObjectiveConfig(pyramid_discount=0.01, pyramid_levels=levels), seeded(seed))[0]
        for levels in (1, 3)
    )
    change = float((three - one).abs().max())
    assert 0 < change < 1.5 * 6 * 0.01**2  # normal values stay below 6; the division by the whole costs a little


@given(
    seed=st.integers(0, 2**32),
    discount=st.floats(0.01, 0.99),
    levels=st.integers(1, 12),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
)
def test_pyramid_noise_has_unit_standard_deviation(
    seed: int, discount: float, levels: int, height: int, width: int
) -> None:
    config = ObjectiveConfig(pyramid_discount=discount, pyramid_levels=levels)
    noise, _ = draw_noise((4, height, width), config, seeded(seed))
    assert noise.shape == (4, height, width)
    assert float(noise.std()) == pytest.approx(1, abs=1e-5)  # some thousand values, summed pairwise


@given(seed=st.integers(0, 2**32), first=st.integers(0, 999), count=st.integers(1, 1000))
def test_timesteps_are_in_the_configured_range(seed: int, first: int, count: int) -> None:
    last = min(first + count - 1, 999)
    for distribution in DISTRIBUTIONS:
        config = ObjectiveConfig(timesteps=distribution, first_timestep=first, last_timestep=last)
        check_timesteps(config, 1000)
        timestep = draw_timestep(config, 1000, seeded(seed))
        assert timestep.shape == () and timestep.dtype == torch.int64
        assert first <= int(timestep) <= last


@given(seed=st.integers(0, 2**32))
def test_uniform_timesteps_are_randint(seed: int) -> None:
    assert torch.equal(
        draw_timestep(ObjectiveConfig(), 1000, seeded(seed)), torch.randint(1000, (), generator=seeded(seed))
    )


def logit_normal(x: Tensor) -> Tensor:
    """P(1 / (1 + exp(-z)) <= x) for z standard normal."""
    return torch.special.ndtr(torch.logit(x))


@pytest.mark.parametrize(
    ("distribution", "cumulative"),
    [
        ("uniform", lambda x: x),
        ("logit-normal", logit_normal),
        ("content", lambda x: 1 - (1 - x) ** (1 / 3)),
        ("style", lambda x: x ** (1 / 3)),
    ],
)
def test_timesteps_follow_their_distribution(distribution: str, cumulative: Callable[[Tensor], Tensor]) -> None:
    draws, rng = 4000, seeded(7)
    config = ObjectiveConfig.model_validate({"timesteps": distribution, "first_timestep": 100, "last_timestep": 899})
    drawn = torch.stack([draw_timestep(config, 1000, rng) for _ in range(draws)])
    assert int(drawn.min()) >= 100 and int(drawn.max()) <= 899  # 1 - u^3 is rounded to 1 three times in a thousand
    steps = torch.arange(100, 900)
    measured = (drawn[None] <= steps[:, None]).double().mean(dim=1)
    expected = cumulative((steps.double() - 99) / 800)
    # Kolmogorov's bound, which one run in a thousand exceeds
    assert float((measured - expected).abs().max()) < 1.95 / math.sqrt(draws)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last_timestep": 1000}, "last_timestep is 1000, but the base has 1000"),
        ({"first_timestep": 1000}, "first_timestep is 1000"),
        ({"first_timestep": 600, "last_timestep": 500}, "first_timestep 600 is above last_timestep 500"),
    ],
)
def test_invalid_timestep_ranges_are_rejected(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_timesteps(ObjectiveConfig.model_validate(settings), 1000)


def test_zero_terminal_snr_agrees_with_diffusers(scheduler: DDPMScheduler) -> None:
    config = ObjectiveConfig(zero_terminal_snr=True)
    ours = alphas_cumprod_of(scheduler.alphas_cumprod, config)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(scheduler.betas), dim=0)
    # diffusers divides neighbors and multiplies them again: a few roundings for each of 1,000 timesteps
    torch.testing.assert_close(ours, theirs, rtol=4 * 1000 * EPSILON, atol=EPSILON)
    assert float(ours[-1]) == 0
    assert torch.equal(ours[0], scheduler.alphas_cumprod[0])
    assert bool((ours.diff() < 0).all())
    assert torch.equal(alphas_cumprod_of(ours, config), ours)
    assert alphas_cumprod_of(scheduler.alphas_cumprod, ObjectiveConfig()) is scheduler.alphas_cumprod


def test_pure_noise_needs_v_prediction(scheduler: DDPMScheduler) -> None:
    alphas = alphas_cumprod_of(scheduler.alphas_cumprod, ObjectiveConfig(zero_terminal_snr=True))
    with pytest.raises(ConfigError, match="needs v-prediction"):
        check_terminal_snr(alphas, "epsilon")
    check_terminal_snr(alphas, "v_prediction")
    check_terminal_snr(scheduler.alphas_cumprod, "epsilon")


def test_snr_agrees_with_diffusers(scheduler: DDPMScheduler) -> None:
    timesteps = torch.arange(1000)
    theirs = compute_snr(scheduler, timesteps)
    torch.testing.assert_close(snr(scheduler.alphas_cumprod), theirs, rtol=8 * EPSILON, atol=0)  # eight roundings
    assert float(snr(torch.zeros(1))) == 0


def test_noisy_latents_and_targets_agree_with_diffusers(scheduler: DDPMScheduler) -> None:
    latent, noise = torch.randn(2, 5, 4, 3, 3, generator=seeded(0)).unbind()
    timestep, alphas = torch.tensor([0, 17, 400, 998, 999]), scheduler.alphas_cumprod
    close = {"rtol": 0, "atol": 6 * 4 * EPSILON}  # values below 6, four roundings
    noisy = noisy_latent(latent, noise, timestep, alphas)
    torch.testing.assert_close(noisy, scheduler.add_noise(latent, noise, timestep), **close)
    velocity = compute_target(latent, noise, timestep, alphas, "v_prediction")
    torch.testing.assert_close(velocity, scheduler.get_velocity(latent, noise, timestep), **close)
    assert compute_target(latent, noise, timestep, alphas, "epsilon") is noise
