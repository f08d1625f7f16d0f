"""Noise schedule: signal and noise level at each timestep, and the noisy latents."""

from typing import Literal

from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.errors import ConfigError

Predicts = Literal["epsilon", "v_prediction"]
"""What the UNet predicts, as diffusers' `prediction_type` names it."""


def alphas_cumprod_of(scheduler_alphas: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return the cumulative products of alpha (T,) to train with.

    With `zero_terminal_snr`, those of the scheduler are rescaled so that the last one is exactly 0 [arXiv:2305.08891,
    algorithm 1]: the square roots are shifted so that the last one is 0, and scaled so that the first one stays the
    same. This is computed in float64 and rounded once.

    Args:
        scheduler_alphas: `alphas_cumprod` (T,) of the base's scheduler.
        config: Gives `zero_terminal_snr`.
    """
    if not config.zero_terminal_snr:
        return scheduler_alphas
    roots = scheduler_alphas.double().sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))).square().to(scheduler_alphas.dtype)


def check_terminal_snr(alphas_cumprod: Tensor, predicts: Predicts) -> None:
    """Check that a schedule that ends in pure noise is used with v-prediction only.

    At a timestep of pure noise the input is the noise itself, so epsilon-prediction learns nothing there, and no image
    can be computed from its prediction.

    Raises:
        ConfigError: The model predicts epsilon, and the SNR of a timestep is 0.
    """
    if predicts == "epsilon" and float(alphas_cumprod.min()) == 0:
        raise ConfigError(
            "a noise schedule that ends in pure noise (zero_terminal_snr) needs v-prediction, but this model predicts "
            "epsilon; set objective.prediction = 'v' or zero_terminal_snr = false"
        )


def snr(alphas_cumprod: Tensor) -> Tensor:
    """Compute the signal-to-noise ratio alpha_bar / (1 - alpha_bar) = (signal / sigma)^2, for any shape."""
    return alphas_cumprod / (1 - alphas_cumprod)


def signal_and_sigma(alphas_cumprod: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar), each (n, 1, 1, 1), at timesteps (n,).

    They are the factors of the latents and of the noise in `noisy_latent`.
    """
    alpha_bar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def noisy_latent(latent: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Add noise to latents: sqrt(alpha_bar) latent + sqrt(1 - alpha_bar) noise [arXiv:2006.11239, eq. 4].

    Args:
        latent: (n, c, h, w).
        noise: (n, c, h, w).
        timestep: (n,), int64.
        alphas_cumprod: (T,).

    Returns:
        Input of the UNet (n, c, h, w).
    """
    signal, sigma = signal_and_sigma(alphas_cumprod, timestep)
    return signal * latent + sigma * noise
