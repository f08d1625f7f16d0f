"""Validation: the loss on held-out images, and the drift of predictions from the base on other prompts.

Timesteps and noise are fixed, so that the losses of two validations differ only by what was trained in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.seeding import make_generator
from lora_diffusion.data.captions import format_caption
from lora_diffusion.training.inputs.captions import CaptionEncoder
from lora_diffusion.training.inputs.latents import LatentView
from lora_diffusion.training.inputs.samples import Sample, collate, draw_sample
from lora_diffusion.training.objectives.denoiser import Denoiser
from lora_diffusion.training.objectives.prior_preservation import predict_both


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Result of one validation."""

    loss: float
    """Mean loss over held-out images and timesteps."""
    by_timestep: tuple[tuple[int, float], ...]
    """Pairs of a timestep and the mean loss at it."""
    drift: float | None
    """Relative change of the predictions on `validation.base_prompts`: the mean square of adapted minus frozen
    prediction, over the mean square of the frozen prediction. None without such prompts."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out images, encoded, with their captions."""

    views: Sequence[LatentView] = field(repr=False)
    """Encoded images."""
    captions: Sequence[str]
    """Caption of each image, before `captions.template` is applied."""


@torch.no_grad()
def run_validation(denoiser: Denoiser, encoder: CaptionEncoder, held_out: HeldOut, config: TrainConfig) -> Validation:
    """Compute losses on held-out images at fixed timesteps with fixed noise, and the drift from the base.

    Args:
        denoiser: The model with the adapter in its current state, in evaluation mode.
        encoder: Encoder of the captions with frozen text encoders.
        held_out: Images to validate on.
        config: Settings of the run.
    """
    timesteps = _validation_timesteps(denoiser.num_timesteps, config)
    losses = torch.zeros(len(timesteps), dtype=torch.float64)
    drifts: list[Tensor] = []
    for number, (view, caption) in enumerate(zip(held_out.views, held_out.captions, strict=True)):
        batch = _fixed_batch(view, caption, number, timesteps, config, denoiser)
        texts = {} if config.trains_captions else to_device(denoiser, encoder.encode_batch(batch["captions"]))
        losses += denoiser(**batch, **texts).double().cpu()
        if config.validation.base_prompts:
            prompt = config.validation.base_prompts[number % len(config.validation.base_prompts)]
            drifts.append(measure_drift(denoiser, encoder, batch, prompt))
    losses /= len(held_out.views)
    return Validation(
        loss=float(losses.mean()),
        by_timestep=tuple(zip(timesteps, map(float, losses), strict=True)),
        drift=float(torch.stack(drifts).mean()) if drifts else None,
    )


def _validation_timesteps(count: int, config: TrainConfig) -> list[int]:
    """Divide the trained timesteps into `validation.draws` equal intervals and return the middle of each."""
    first, last = config.objective.first_timestep, config.objective.last_timestep
    last = count - 1 if last is None else last
    draws = config.validation.draws
    return [first + int((i + 0.5) * (last + 1 - first) / draws) for i in range(draws)]


def _fixed_batch(
    view: LatentView, caption: str, number: int, timesteps: Sequence[int], config: TrainConfig, denoiser: Denoiser
) -> dict[str, Any]:
    """Make a batch of one held-out image at every timestep.

    The noise depends only on the image's number and the position of the timestep, so it is the same at each validation.
    """
    text = format_caption(caption, config.captions, config.trigger_words)
    samples: list[Sample] = []
    for position, timestep in enumerate(timesteps):
        rng = make_generator(number, position)
        samples.append(
            {
                **draw_sample(view, text, config.objective, denoiser.num_timesteps, rng),
                "timestep": torch.tensor(timestep),
            }
        )
    return to_device(denoiser, collate(samples))


def measure_drift(denoiser: Denoiser, encoder: CaptionEncoder, batch: dict[str, Any], prompt: str) -> Tensor:
    """Measure how much the adapter changes the prediction for a prompt that it was not trained on.

    Args:
        denoiser: The model with the adapter.
        encoder: Encoder of the prompt with frozen text encoders.
        batch: A collated batch on the denoiser's device; its captions are replaced by `prompt`.
        prompt: The prompt.

    Returns:
        Scalar: the mean squared difference of adapted and frozen prediction, over the frozen one's mean square.
    """
    noisy = batch["latent"], batch["noise"], batch["timestep"]
    frozen, adapted = predict_both(denoiser, encoder, [prompt] * len(batch["captions"]), noisy, batch["time_ids"])
    return (adapted - frozen).square().mean() / frozen.square().mean()


def to_device(denoiser: Denoiser, batch: dict[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch to the denoiser's device; other values are left as they are."""
    device = denoiser.alphas_cumprod.device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Best validation so far, and the number of validations since then."""

    step: int = 0
    """Step of the best validation; 0 before the first validation."""
    loss: float = float("inf")
    """Loss of the best validation."""
    since: int = 0
    """Number of validations since the best one."""

    def update(self, step: int, loss: float) -> "EarlyStopping":
        """Return the record after another validation, which had this loss at this step."""
        if loss < self.loss:
            return EarlyStopping(step=step, loss=loss)
        return EarlyStopping(step=self.step, loss=self.loss, since=self.since + 1)
