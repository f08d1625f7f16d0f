"""How much of a picture is left at each timestep."""

from typing import Literal

from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.errors import ConfigError

Predicts = Literal["epsilon", "v_prediction"]


def alphas_cumprod_of(scheduler_alphas: Tensor, config: ObjectiveConfig) -> Tensor:
    """The cumulative products of alpha (T,) to train on: the scheduler's own, or with a last one of exactly 0.

    The rescaling is that of arXiv 2305.08891, algorithm 1: square roots are shifted so that the last is 0 and scaled so
    that the first stays what it is. In float64, rounded once.
    """
    if not config.zero_terminal_snr:
        return scheduler_alphas
    roots = scheduler_alphas.double().sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))).square().to(scheduler_alphas.dtype)


def check_terminal_snr(alphas_cumprod: Tensor, predicts: Predicts) -> None:
    """Raises ConfigError for epsilon-prediction with a last timestep of pure noise.

    There the input is the noise itself, so that predicting it teaches nothing, and no picture can be had from it.
    """
    if predicts == "epsilon" and float(alphas_cumprod.min()) == 0:
        raise ConfigError(
            "a noise schedule that ends in pure noise (zero_terminal_snr) needs v-prediction, and epsilon is predicted "
            "here; set objective.prediction = 'v' or zero_terminal_snr = false"
        )


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar) = (signal / sigma)^2, of any shape."""
    return alphas_cumprod / (1 - alphas_cumprod)


def signal_and_sigma(alphas_cumprod: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of picture and noise at timesteps (n,), each (n, 1, 1, 1): roots of alpha_bar and 1 - alpha_bar."""
    alpha_bar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def noisy_latent(latent: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the UNet sees (n, c, h, w): sqrt(alpha_bar) latent + sqrt(1 - alpha_bar) noise [arXiv 2006.11239, eq. 4]."""
    signal, sigma = signal_and_sigma(alphas_cumprod, timestep)
    return signal * latent + sigma * noise
