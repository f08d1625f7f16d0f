"""Whether a run still gets better: the loss on held-out pictures, without luck in it, and the drift from the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.data.captions import format_caption
from lora_diffusion.training.inputs.captions import CaptionEncoder
from lora_diffusion.training.inputs.latents import LatentView
from lora_diffusion.training.inputs.samples import collate, draw_sample
from lora_diffusion.training.objectives.denoiser import Denoiser
from lora_diffusion.training.objectives.prior_preservation import predict_both
from lora_diffusion.training.seeding import sample_seed


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was found after a step."""

    loss: float
    """Mean over held-out pictures and timesteps."""
    by_timestep: tuple[tuple[int, float], ...]
    """Mean loss at each timestep."""
    drift: float | None
    """Mean squared change of the base's prediction on other prompts over its mean square; None without such prompts."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Encoded pictures with their captions."""

    views: Sequence[LatentView]
    captions: Sequence[str]


@torch.no_grad()
def validate(denoiser: Denoiser, encoder: CaptionEncoder, held_out: HeldOut, config: TrainConfig) -> Validation:
    """Losses at fixed timesteps with fixed noise, so that two validations differ by what was learned alone."""
    timesteps = validation_timesteps(denoiser.num_timesteps, config)
    losses = torch.zeros(len(timesteps), dtype=torch.float64)
    drifts: list[Tensor] = []
    for number, (seen, caption) in enumerate(zip(held_out.views, held_out.captions, strict=True)):
        batch = fixed_batch(seen, caption, number, timesteps, config, denoiser)
        texts = {} if config.trains_captions else to_device(denoiser, encoder.encode_batch(batch["captions"]))
        losses += denoiser(**batch, **texts).double().cpu()
        if config.validation.base_prompts:
            prompt = config.validation.base_prompts[number % len(config.validation.base_prompts)]
            drifts.append(measure_drift(denoiser, encoder, batch, prompt))
    losses /= len(held_out.views)
    return Validation(
        loss=float(losses.mean()),
        by_timestep=tuple(zip(timesteps, losses.tolist(), strict=True)),
        drift=float(torch.stack(drifts).mean()) if drifts else None,
    )


def validation_timesteps(count: int, config: TrainConfig) -> list[int]:
    """The middles of equal stretches of the timesteps that are trained."""
    first, last = config.objective.first_timestep, config.objective.last_timestep
    last = count - 1 if last is None else last
    draws = config.validation.draws
    return [first + int((i + 0.5) * (last + 1 - first) / draws) for i in range(draws)]


def fixed_batch(
    seen: LatentView, caption: str, number: int, timesteps: Sequence[int], config: TrainConfig, denoiser: Denoiser
) -> dict[str, Any]:
    """One held-out picture at every timestep, each with noise of its own that is the same at each validation."""
    text, samples = format_caption(caption, config.captions, config.trigger_words), []
    for place, timestep in enumerate(timesteps):
        rng = Generator().manual_seed(sample_seed(number, place))
        samples.append(
            {
                **draw_sample(seen, text, config.objective, denoiser.num_timesteps, rng),
                "timestep": torch.tensor(timestep),
            }
        )
    return to_device(denoiser, collate(samples))


def measure_drift(denoiser: Denoiser, encoder: CaptionEncoder, batch: dict[str, Any], prompt: str) -> Tensor:
    """How far the adapter moves the prediction for a prompt that it was not trained on."""
    noisy = batch["latent"], batch["noise"], batch["timestep"]
    frozen, moved = predict_both(denoiser, encoder, [prompt] * len(batch["captions"]), noisy, batch["time_ids"])
    return (moved - frozen).square().mean() / frozen.square().mean()


def to_device(denoiser: Denoiser, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch's tensors on the denoiser's device."""
    device = denoiser.alphas_cumprod.device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """The best validation so far, and for how many validations there has been none better."""

    step: int = 0
    loss: float = float("inf")
    since: int = 0

    def updated_with(self, step: int, loss: float) -> "EarlyStopping":
        if loss < self.loss:
            return EarlyStopping(step=step, loss=loss)
        return EarlyStopping(step=self.step, loss=self.loss, since=self.since + 1)
