"""Record a blend's predictions along its own sampling runs, as training data for distillation.

The weights of some blends (switch, K-LoRA, schedules) depend on the denoising step, so the predictions are recorded
during sampling and no training images are needed. Sampling is deterministic (DDIM [arXiv:2010.02502]). At each step the
latent is recorded with the prediction for the prompt and, with classifier-free guidance, for the empty prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.core.seeding import derive_seed
from lora_diffusion.inference.composition import BeforeStep
from lora_diffusion.models.load import Base, new_scheduler
from lora_diffusion.models.text_encoding import TextContext, concatenate_contexts, count_chunks, negative_context
from lora_diffusion.prompts.emphasis import parse_emphasis

Contexts = Mapping[str, TextContext]
"""Conditioning of the UNet by text, each for a batch of one."""


@dataclass(frozen=True, kw_only=True)
class SamplingRun:
    """Denoising of one image."""

    prompt: str
    """Prompt of the image."""
    seed: int
    """Seed of the initial noise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationBatch:
    """Inputs of the UNet and the blend's predictions for them, on the base's device."""

    latents: Tensor = field(repr=False)
    """Noisy latents, (n, c, h, w)."""
    timesteps: Tensor = field(repr=False)
    """Training timesteps, (n,)."""
    texts: tuple[str, ...]
    """Prompts, n strings."""
    predictions: Tensor = field(repr=False)
    """Predictions, (n, c, h, w), float32: noise or velocity, depending on the base's prediction type."""

    def __len__(self) -> int:
        """Return the number of predictions."""
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "DistillationBatch":
        """Return the rows with these indices."""
        index = torch.tensor(rows, device=self.latents.device)
        return DistillationBatch(
            latents=self.latents[index],
            timesteps=self.timesteps[index],
            texts=tuple(self.texts[row] for row in rows),
            predictions=self.predictions[index],
        )

    def batches(self, size: int) -> "Iterator[DistillationBatch]":
        """Yield all rows in order, in batches of at most `size`."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))


def _concatenate(parts: Sequence[DistillationBatch]) -> DistillationBatch:
    return DistillationBatch(
        latents=torch.cat([part.latents for part in parts]),
        timesteps=torch.cat([part.timesteps for part in parts]),
        texts=tuple(text for part in parts for text in part.texts),
        predictions=torch.cat([part.predictions for part in parts]),
    )


def make_runs(prompts: Sequence[str], *, count: int, seed: int) -> tuple[SamplingRun, ...]:
    """Return `count` sampling runs for each prompt, all with different seeds."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    return tuple(SamplingRun(prompt=text, seed=derive_seed(seed, i)) for i, text in enumerate(texts))


@torch.no_grad()
def record_runs(
    base: Base, before_step: BeforeStep, runs: Sequence[SamplingRun], config: DistillConfig
) -> DistillationBatch:
    """Record the inputs and predictions of all steps of several sampling runs.

    Args:
        base: The base with the blend, inside `composition_context`.
        before_step: The callback that `composition_context` yields; it applies the blend for a step.
        runs: The runs.
        config: Settings of the distillation; `batch_size` runs are sampled together.
    """
    size = config.batch_size
    groups = [runs[start : start + size] for start in range(0, len(runs), size)]
    return _concatenate([part for group in groups for part in _record_steps(base, before_step, group, config)])


def _record_steps(
    base: Base, before_step: BeforeStep, runs: Sequence[SamplingRun], config: DistillConfig
) -> Iterator[DistillationBatch]:
    """Sample several runs as one batch; yield the inputs and predictions of each step."""
    size_px = config.resolution or base.size_px
    texts = ["" for _ in runs] * (config.guidance_scale > 1) + [run.prompt for run in runs]

    def encode() -> TextContext:
        return batch_contexts(encode_texts(base, texts, size_px), texts)

    scheduler: Any = cast(Any, new_scheduler(base, "ddim"))
    scheduler.set_timesteps(config.num_inference_steps, device=base.device)
    x = (
        torch.cat([_initial_latents(base, run.seed, size_px) for run in runs]).to(base.device)
        * scheduler.init_noise_sigma
    )
    context = None
    for step, timestep in enumerate(scheduler.timesteps):
        before_step(DenoisingStep(index=step, total=config.num_inference_steps), lambda: encode().hidden)
        context = context or encode()
        latents = x.repeat(len(texts) // len(runs), 1, 1, 1)
        predictions = predict(base, latents, timestep, context)
        timesteps = timestep.expand(len(texts))
        yield DistillationBatch(latents=latents, timesteps=timesteps, texts=tuple(texts), predictions=predictions)
        x = scheduler.step(_apply_guidance(predictions, len(runs), config.guidance_scale), timestep, x).prev_sample


def _initial_latents(base: Base, seed: int, size_px: int) -> Tensor:
    """Return the same initial noise, (1, c, h, w), as diffusers' pipeline draws for this seed."""
    side = size_px // int(base.pipe.vae_scale_factor)
    shape = (1, base.pipe.unet.config.in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def _apply_guidance(predictions: Tensor, count: int, guidance: float) -> Tensor:
    """Apply classifier-free guidance [arXiv:2207.12598].

    Args:
        predictions: Predictions for `count` prompts, preceded by those for the empty prompt if guidance is used.
        count: Number of prompts.
        guidance: Guidance scale.
    """
    if len(predictions) == count:
        return predictions
    empty, prompted = predictions.chunk(2)
    return empty + guidance * (prompted - empty)


def predict(base: Base, latents: Tensor, timestep: Tensor, context: TextContext) -> Tensor:
    """Return the UNet's prediction in the base's current state.

    Args:
        base: The base.
        latents: Noisy latents, (n, c, h, w).
        timestep: Training timesteps, (n,), or one for all.
        context: Conditioning for n samples.

    Returns:
        Predicted noise or velocity, (n, c, h, w), float32.
    """
    unet = base.pipe.unet
    result = unet(
        latents.to(unet.dtype), timestep, encoder_hidden_states=context.hidden, added_cond_kwargs=context.added
    )
    return result.sample.float()


@torch.no_grad()
def encode_texts(base: Base, texts: Sequence[str], size_px: int) -> Contexts:
    """Encode each distinct text with the base's text encoders in their current state.

    All texts are padded to the same number of chunks. The empty text is encoded as the pipeline encodes an empty
    negative prompt, which is all zeros for some SDXL bases.
    """
    count = count_chunks(base, [parse_emphasis(text) for text in texts])
    return {text: negative_context(base, text, size_px=size_px, chunks=count) for text in dict.fromkeys(texts)}


def batch_contexts(contexts: Contexts, texts: Sequence[str]) -> TextContext:
    """Concatenate the conditioning of several texts to a batch."""
    return concatenate_contexts([contexts[text] for text in texts])
