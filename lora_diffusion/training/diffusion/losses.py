"""Losses of a prediction against its target, one value per sample.

With signal^2 = alpha_bar, sigma^2 = 1 - alpha_bar and SNR = alpha_bar / (1 - alpha_bar) at a timestep:

    target      epsilon: noise           v: signal * noise - sigma * latent           [arXiv:2202.00512, appendix D]
    distance    mse: d^2                 l1: |d|            huber, smooth-l1: see `elementwise_loss`
    weighting                            epsilon               v
                none                     1                     1
                min-snr                  min(1, gamma / SNR)   min(SNR, gamma) / (SNR + 1)       [arXiv:2303.09556]
                debiased                 1 / sqrt(SNR)         sqrt(SNR) / (SNR + 1)             [arXiv:2310.08442]

The squared errors of the two parametrizations are related by err_epsilon^2 = signal^2 * err_v^2. The weight for v is
therefore the weight for epsilon times SNR / (SNR + 1), so that the loss of a network does not depend on its
parametrization. kohya's trainer uses 1 / (SNR + 1) for debiased v instead.

At SNR 0 the weights for v are 0, the min-SNR weight for epsilon is 1, and the debiased weight for epsilon is infinite;
`check_terminal_snr` rejects runs in which the last one could occur.
"""

import torch
from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.training.diffusion.schedule import Predicts, signal_and_sigma, snr


def compute_target(
    latent: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor, predicts: Predicts
) -> Tensor:
    """Compute the target of the UNet's prediction: the noise, or the velocity v.

    Args:
        latent: (n, c, h, w).
        noise: (n, c, h, w).
        timestep: (n,), int64.
        alphas_cumprod: (T,).
        predicts: Parametrization of the UNet.

    Returns:
        The target (n, c, h, w).
    """
    if predicts == "epsilon":
        return noise
    signal, sigma = signal_and_sigma(alphas_cumprod, timestep)
    return signal * noise - sigma * latent


def sample_losses(
    predicted: Tensor,
    target: Tensor,
    *,
    timestep: Tensor,
    alphas_cumprod: Tensor,
    predicts: Predicts,
    config: ObjectiveConfig,
    mask: Tensor | None,
) -> Tensor:
    """Compute the weighted loss of each sample.

    Args:
        predicted: Predictions (n, c, h, w).
        target: Targets (n, c, h, w).
        timestep: (n,), int64.
        alphas_cumprod: (T,).
        predicts: Parametrization of the predictions.
        config: Distance, its parameters and the weighting of timesteps.
        mask: Weights 0..1 of the pixels (n, 1, h, w), or None for 1 everywhere; see `masked_mean`.

    Returns:
        Losses (n,) in float32.
    """
    difference = predicted.float() - target.float()
    losses = masked_mean(elementwise_loss(difference, huber_delta(timestep, alphas_cumprod, config), config), mask)
    if config.weighting == "none":
        return losses
    return losses * loss_weight(snr(alphas_cumprod[timestep]), predicts, config)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the means (n,) of values (n, c, h, w), weighted by a mask (n, 1, h, w).

    The sums are divided by the area of the mask, so that a small mask has the same weight as a whole picture. The mean
    is 0 where the mask is 0 everywhere.
    """
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    weights = mask.float()
    area = weights.sum(dim=(1, 2, 3))
    weighted_sum = (values.mean(dim=1, keepdim=True) * weights).sum(dim=(1, 2, 3))
    return torch.where(area > 0, weighted_sum / torch.where(area > 0, area, 1), 0)


def elementwise_loss(difference: Tensor, delta: Tensor, config: ObjectiveConfig) -> Tensor:
    """Compute the elementwise distance for differences d (n, c, h, w) and Huber parameters delta (n,).

    huber is the pseudo-Huber loss 2 delta (sqrt(d^2 + delta^2) - delta) [arXiv:2403.16728], which is about d^2 for
    small d and 2 delta |d| for large d. smooth-l1 is huber / delta. Both are computed without the subtraction, which
    would lose all digits for small d.
    """
    if config.loss == "mse":
        return difference.square()
    if config.loss == "l1":
        return difference.abs()
    delta, square = delta.view(-1, 1, 1, 1), difference.square()
    smooth = 2 * square / ((square + delta.square()).sqrt() + delta)
    return delta * smooth if config.loss == "huber" else smooth


def huber_delta(timestep: Tensor, alphas_cumprod: Tensor, config: ObjectiveConfig) -> Tensor:
    """Compute the parameter delta (n,) of the Huber losses at timesteps (n,), in float32 [arXiv:2403.16728].

    `constant` uses `huber_delta` everywhere. The other schedules fall from about 1 at low noise to `huber_delta` in
    pure noise: exponential is huber_delta^(t / T), snr is (1 - huber_delta) / (1 + sigma / signal)^2 + huber_delta.
    """
    if config.huber_schedule == "constant":
        return torch.full(timestep.shape, config.huber_delta, device=timestep.device)
    if config.huber_schedule == "exponential":
        return config.huber_delta ** (timestep / len(alphas_cumprod))
    alpha_bar = alphas_cumprod[timestep].float()
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return (1 - config.huber_delta) * (signal / (signal + sigma)).square() + config.huber_delta


def loss_weight(ratio: Tensor, predicts: Predicts, config: ObjectiveConfig) -> Tensor:
    """Compute the loss weights of timesteps from their signal-to-noise ratios, by the table in the module docstring.

    Args:
        ratio: Signal-to-noise ratios, of any shape.
        predicts: Parametrization of the predictions.
        config: Gives the weighting and `min_snr_gamma`.

    Returns:
        Weights of the shape of `ratio`.
    """
    epsilon = predicts == "epsilon"
    if config.weighting == "min-snr":
        gamma = config.min_snr_gamma
        return (gamma / ratio).clamp(max=1) if epsilon else ratio.clamp(max=gamma) / (ratio + 1)
    if config.weighting == "debiased":
        return ratio.rsqrt() if epsilon else ratio.sqrt() / (ratio + 1)
    return torch.ones_like(ratio)
