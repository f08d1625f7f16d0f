"""How far a prediction is from its target: one number per sample.

With alpha_bar, signal^2 = alpha_bar, sigma^2 = 1 - alpha_bar and SNR = alpha_bar / (1 - alpha_bar) at a timestep:

    target      epsilon: noise           v: signal noise - sigma latent    [arXiv 2202.00512, appendix D]
    distance    mse d^2, l1 |d|, and the pseudo-Huber losses below          [arXiv 2403.16728]
    weight      none 1                    epsilon               v
                min-SNR          min(1, gamma / SNR)   min(SNR, gamma) / (SNR + 1)    [arXiv 2303.09556]
                debiased         1 / sqrt(SNR)         sqrt(SNR) / (SNR + 1)          [arXiv 2310.08442]

Squared errors of the two parametrizations are related by err_epsilon^2 = signal^2 err_v^2, so a weight for v is the one
for epsilon times SNR / (SNR + 1): the same network weighs the same either way. (kohya's trainer takes 1 / (SNR + 1) for
debiased v.) At SNR 0 the weights for v are 0, that of min-SNR for epsilon is 1 and that of debiased epsilon is
infinite, as in the formulas; `check_terminal_snr` keeps runs away from the last.
"""

import torch
from torch import Tensor

from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.training.diffusion.schedule import Predicts, signal_and_sigma, snr


def compute_target(
    latent: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor, predicts: Predicts
) -> Tensor:
    """What the UNet should predict (n, c, h, w) for latents and noise of that shape and timesteps (n,)."""
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
    """(n,) losses in float32 of predictions and targets (n, c, h, w) at timesteps (n,).

    A mask (n, 1, h, w) of weights 0..1 says where the loss counts; `masked_mean` says how.
    """
    difference = predicted.float() - target.float()
    losses = masked_mean(elementwise_loss(difference, huber_delta(timestep, alphas_cumprod, config), config), mask)
    if config.weighting == "none":
        return losses
    return losses * loss_weight(snr(alphas_cumprod[timestep]), predicts, config)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means (n,) of values (n, c, h, w), weighted by a mask (n, 1, h, w).

    Divided by the mask's own area, so that a small mask weighs as much as a whole picture. A mask that is 0 everywhere
    gives 0: nothing of that picture counts.
    """
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    weights = mask.float()
    area = weights.sum(dim=(1, 2, 3))
    total = (values.mean(dim=1, keepdim=True) * weights).sum(dim=(1, 2, 3))
    return torch.where(area > 0, total / torch.where(area > 0, area, 1), 0)


def elementwise_loss(difference: Tensor, delta: Tensor, config: ObjectiveConfig) -> Tensor:
    """Elementwise distance for differences (n, c, h, w) and turning points delta (n,).

    huber is 2 delta (sqrt(d^2 + delta^2) - delta): d^2 where d is small, 2 delta |d| where it is large. smooth-l1 is
    that divided by delta. Both are written without the subtraction, which would cancel for small d.
    """
    if config.loss == "mse":
        return difference.square()
    if config.loss == "l1":
        return difference.abs()
    turn, square = delta.view(-1, 1, 1, 1), difference.square()
    smooth = 2 * square / ((square + turn.square()).sqrt() + turn)
    return turn * smooth if config.loss == "huber" else smooth


def huber_delta(timestep: Tensor, alphas_cumprod: Tensor, config: ObjectiveConfig) -> Tensor:
    """The turning point (n,) of the Huber losses, float32 [arXiv 2403.16728].

    Both schedules go from about 1 in clean pictures to `huber_delta` in pure noise, over T timesteps: exponential is
    huber_delta^(t / T), snr is (1 - huber_delta) / (1 + sigma / signal)^2 + huber_delta.
    """
    if config.huber_schedule == "constant":
        return torch.full(timestep.shape, config.huber_delta, device=timestep.device)
    if config.huber_schedule == "exponential":
        return config.huber_delta ** (timestep / len(alphas_cumprod))
    alpha_bar = alphas_cumprod[timestep].float()
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return (1 - config.huber_delta) * (signal / (signal + sigma)).square() + config.huber_delta


def loss_weight(ratio: Tensor, predicts: Predicts, config: ObjectiveConfig) -> Tensor:
    """Weights of timesteps with signal-to-noise ratios `ratio`, any shape; the table above."""
    epsilon = predicts == "epsilon"
    if config.weighting == "min-snr":
        gamma = config.min_snr_gamma
        return (gamma / ratio).clamp(max=1) if epsilon else ratio.clamp(max=gamma) / (ratio + 1)
    if config.weighting == "debiased":
        return ratio.rsqrt() if epsilon else ratio.sqrt() / (ratio + 1)
    return torch.ones_like(ratio)
