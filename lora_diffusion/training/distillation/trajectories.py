"""What a blend predicts along its own sampling runs: pairs of input and prediction for a student to imitate.

A blend that goes by steps (switch, K-LoRA, schedules) predicts something only at a step of a run, so the runs
themselves are the data and no picture is needed: deterministic sampling (DDIM [arXiv:2010.02502]), each latent with
what is predicted there for the prompt and, if there is guidance, for the empty prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.inference.composition import BeforeStep
from lora_diffusion.models.load import Base, new_scheduler
from lora_diffusion.models.text_encoding import TextContext, concatenate_contexts, count_chunks, negative_context
from lora_diffusion.prompts.emphasis import parse_emphasis
from lora_diffusion.training.seeding import sample_seed

Contexts = Mapping[str, TextContext]
"""What the UNet is told for each text, one sample each."""


@dataclass(frozen=True, kw_only=True)
class SamplingRun:
    """One picture's denoising."""

    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationBatch:
    """Inputs of the UNet and what the blend predicts for them, on the base's device in float32."""

    latents: Tensor
    """(n, c, h, w)."""
    timesteps: Tensor
    """(n,)."""
    texts: tuple[str, ...]
    """n prompts, as they are before any text encoder reads them."""
    predictions: Tensor
    """(n, c, h, w): noise or velocity, as the base's kind is."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "DistillationBatch":
        """Some of them."""
        index = torch.tensor(rows, device=self.latents.device)
        return DistillationBatch(
            latents=self.latents[index],
            timesteps=self.timesteps[index],
            texts=tuple(self.texts[row] for row in rows),
            predictions=self.predictions[index],
        )

    def batches(self, size: int) -> "Iterator[DistillationBatch]":
        """All of them, in order."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))


def concatenate(parts: Sequence[DistillationBatch]) -> DistillationBatch:
    return DistillationBatch(
        latents=torch.cat([part.latents for part in parts]),
        timesteps=torch.cat([part.timesteps for part in parts]),
        texts=tuple(text for part in parts for text in part.texts),
        predictions=torch.cat([part.predictions for part in parts]),
    )


def make_runs(prompts: Sequence[str], *, count: int, seed: int) -> tuple[SamplingRun, ...]:
    """`count` runs for each prompt, no two from the same noise."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    return tuple(SamplingRun(prompt=text, seed=sample_seed(seed, i)) for i, text in enumerate(texts))


@torch.no_grad()
def record_runs(
    base: Base, before_step: BeforeStep, runs: Sequence[SamplingRun], config: DistillConfig
) -> DistillationBatch:
    """Record the inputs and predictions of sampling runs, inside `composition_context`, which yields `before_step`."""
    size = config.batch_size
    groups = [runs[start : start + size] for start in range(0, len(runs), size)]
    return concatenate([part for group in groups for part in record_steps(base, before_step, group, config)])


def record_steps(
    base: Base, before_step: BeforeStep, runs: Sequence[SamplingRun], config: DistillConfig
) -> Iterator[DistillationBatch]:
    """The pairs of each step of several runs side by side."""
    size_px = config.resolution or base.size_px
    texts = ["" for _ in runs] * (config.guidance > 1) + [run.prompt for run in runs]

    def encode() -> TextContext:
        return batch_contexts(encode_texts(base, texts, size_px), texts)

    scheduler = new_scheduler(base, "ddim")
    scheduler.set_timesteps(config.sampler_steps, device=base.device)
    x = (
        torch.cat([initial_latents(base, run.seed, size_px) for run in runs]).to(base.device)
        * scheduler.init_noise_sigma
    )
    context = None
    for step, timestep in enumerate(scheduler.timesteps):
        before_step(DenoisingStep(index=step, total=config.sampler_steps), lambda: encode().hidden)
        context = context or encode()
        latents = x.repeat(len(texts) // len(runs), 1, 1, 1)
        predictions = predict(base, latents, timestep, context)
        timesteps = timestep.expand(len(texts))
        yield DistillationBatch(latents=latents, timesteps=timesteps, texts=tuple(texts), predictions=predictions)
        x = scheduler.step(apply_guidance(predictions, len(runs), config.guidance), timestep, x).prev_sample


def initial_latents(base: Base, seed: int, size_px: int) -> Tensor:
    """(1, c, h, w): what the pipeline starts from for this seed."""
    side = size_px // int(base.pipe.vae_scale_factor)
    shape = (1, base.pipe.unet.config.in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def apply_guidance(predictions: Tensor, count: int, guidance: float) -> Tensor:
    """Classifier-free guidance [arXiv:2207.12598]: away from what is predicted without the prompt, if that is there."""
    if len(predictions) == count:
        return predictions
    empty, prompted = predictions.chunk(2)
    return empty + guidance * (prompted - empty)


def predict(base: Base, latents: Tensor, timestep: Tensor, context: TextContext) -> Tensor:
    """What the base as it is predicts, (n, c, h, w) in float32, at timesteps (n,) or one for all."""
    unet = base.pipe.unet
    result = unet(
        latents.to(unet.dtype), timestep, encoder_hidden_states=context.hidden, added_cond_kwargs=context.added
    )
    return result.sample.float()


@torch.no_grad()
def encode_texts(base: Base, texts: Sequence[str], size_px: int) -> Contexts:
    """Each text as the base's text encoders read it as they are, once, the empty one as a negative prompt."""
    count = count_chunks(base, [parse_emphasis(text) for text in texts])
    return {text: negative_context(base, text, size_px=size_px, chunks=count) for text in dict.fromkeys(texts)}


def batch_contexts(contexts: Contexts, texts: Sequence[str]) -> TextContext:
    """What a batch of texts is told."""
    return concatenate_contexts([contexts[text] for text in texts])
