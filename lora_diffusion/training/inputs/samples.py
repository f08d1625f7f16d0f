"""Training samples: an image's latent with noise, timestep and caption.

Each sample is a pure function of the run's seed and the sample's index. Sample k is therefore the same for every batch
size and number of processes, and also after the run was resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Generator, Tensor

from lora_diffusion.config.train import ObjectiveConfig, TrainConfig
from lora_diffusion.core.seeding import derive_seed, make_generator
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.captions import augment_caption
from lora_diffusion.data.folder import Example
from lora_diffusion.data.sampler import plan_batches
from lora_diffusion.training.diffusion.noise import draw_noise
from lora_diffusion.training.diffusion.timesteps import draw_timestep
from lora_diffusion.training.inputs.latents import LatentView, ViewEncoder


class Sample(TypedDict):
    """One training sample, before the noise is added to the latent."""

    latent: Tensor
    """Clean scaled latent, (c, h, w)."""
    noise: Tensor
    """Noise that the target is computed from, (c, h, w)."""
    input_noise: Tensor
    """Noise that is added to the latent, (c, h, w); differs from `noise` with `objective.input_perturbation`."""
    timestep: Tensor
    """Training timestep, scalar."""
    mask: Tensor
    """Weight of the loss at each latent pixel, (1, h, w)."""
    time_ids: Tensor
    """SDXL's size and crop conditioning, (6,)."""
    caption: str
    """Caption after template, shuffling and dropout."""


@dataclass(frozen=True, kw_only=True)
class TrainingSamples:
    """All training samples of a run, computed on demand."""

    config: TrainConfig
    """Settings of the run."""
    examples: Sequence[Example]
    """Images with captions."""
    buckets: Sequence[Bucket]
    """Bucket of each image."""
    encoder: ViewEncoder
    """Encoder of the images."""
    num_timesteps: int
    """Number of timesteps of the noise schedule."""
    order: Sequence[Sequence[int]]
    """Indices into `examples` for each optimizer step."""

    def sample(self, step: int, position: int) -> Sample:
        """Return the sample at a position within an optimizer step; both are counted from 0."""
        config, number = self.config, self.order[step][position]
        index = step * len(self.order[0]) + position
        rng = make_generator(config.seed, index)
        variant = index if config.data.cache == "none" else index // len(self.examples) % config.data.variants
        view = self.encoder.encode(
            self.examples[number], self.buckets[number], seed=derive_seed(config.seed, -2 - number), variant=variant
        )
        caption = augment_caption(self.examples[number].caption, config.captions, config.trigger_words, rng)
        return draw_sample(view, caption, config.objective, self.num_timesteps, rng)


def draw_sample(view: LatentView, caption: str, config: ObjectiveConfig, num_timesteps: int, rng: Generator) -> Sample:
    """Draw a latent from the view's distribution, and noise and a timestep.

    Args:
        view: The encoded image.
        caption: Its caption.
        config: How noise and timesteps are drawn.
        num_timesteps: Number of timesteps of the noise schedule.
        rng: Source of all random numbers.
    """
    channels, height, width = view.mean.shape
    epsilon, shape = torch.randn(view.mean.shape, generator=rng), (channels, height, width)
    noise, input_noise = draw_noise(shape, config, rng)
    return Sample(
        timestep=draw_timestep(config, num_timesteps, rng),
        noise=noise,
        input_noise=input_noise,
        latent=view.mean + view.std * epsilon,
        mask=view.mask,
        time_ids=view.time_ids,
        caption=caption,
    )


def plan_order(
    config: TrainConfig, examples: Sequence[Example], buckets: Sequence[Bucket], per_step: int
) -> tuple[tuple[int, ...], ...]:
    """Plan which images each optimizer step trains on.

    Args:
        config: Settings of the run.
        examples: Images with captions.
        buckets: Bucket of each image; all images of a step come from one bucket.
        per_step: Images per optimizer step, over all processes.

    Returns:
        Indices into `examples` for each optimizer step.
    """
    repeats = [example.repeats * config.data.repeats for example in examples]
    return plan_batches(buckets, repeats, per_step=per_step, steps=config.steps, seed=config.seed)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor | list[str]]:
    """Stack the tensors of several samples, and put their captions into a list."""
    tensors = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "caption"}
    return {**tensors, "captions": [sample["caption"] for sample in samples]}
