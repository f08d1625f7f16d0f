"""The samples of a run, each a function of the seed and its place alone.

Sample k of a run is the same whatever the batch size, the number of processes, or where a run was taken up again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Generator, Tensor

from lora_diffusion.config.train import ObjectiveConfig, TrainConfig
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.captions import augment_caption
from lora_diffusion.data.folder import Example
from lora_diffusion.data.sampler import plan_batches
from lora_diffusion.training.diffusion.noise import draw_noise
from lora_diffusion.training.diffusion.timesteps import draw_timestep
from lora_diffusion.training.inputs.latents import LatentView, ViewEncoder
from lora_diffusion.training.seeding import sample_seed


class Sample(TypedDict):
    """One training sample before noise is added."""

    latent: Tensor
    noise: Tensor
    input_noise: Tensor
    timestep: Tensor
    mask: Tensor
    time_ids: Tensor
    caption: str


@dataclass(frozen=True, kw_only=True)
class TrainingSamples:
    """Which picture comes when, and what is drawn for it."""

    config: TrainConfig
    examples: Sequence[Example]
    buckets: Sequence[Bucket]
    """Of each example."""
    encoder: ViewEncoder
    num_timesteps: int
    order: Sequence[Sequence[int]]
    """Example numbers of each optimizer step."""

    def sample(self, step: int, place: int) -> Sample:
        """The sample at a place of an optimizer step, counted from 0."""
        config, number = self.config, self.order[step][place]
        index = step * len(self.order[0]) + place
        rng = Generator().manual_seed(sample_seed(config.seed, index))
        variant = index if config.data.cache == "none" else index // len(self.examples) % config.data.variants
        seen = self.encoder.encode(
            self.examples[number], self.buckets[number], seed=sample_seed(config.seed, -2 - number), variant=variant
        )
        caption = augment_caption(self.examples[number].caption, config.captions, config.trigger_words, rng)
        return draw_sample(seen, caption, config.objective, self.num_timesteps, rng)


def draw_sample(seen: LatentView, caption: str, config: ObjectiveConfig, num_timesteps: int, rng: Generator) -> Sample:
    """A sample with a latent from the view's distribution, noise and timestep."""
    channels, height, width = seen.mean.shape
    spread, shape = torch.randn(seen.mean.shape, generator=rng), (channels, height, width)
    noise, input_noise = draw_noise(shape, config, rng)
    return Sample(
        timestep=draw_timestep(config, num_timesteps, rng),
        noise=noise,
        input_noise=input_noise,
        latent=seen.mean + seen.std * spread,
        mask=seen.mask,
        time_ids=seen.time_ids,
        caption=caption,
    )


def plan_order(
    config: TrainConfig, examples: Sequence[Example], buckets: Sequence[Bucket], per_step: int
) -> tuple[tuple[int, ...], ...]:
    """Example numbers of every optimizer step."""
    repeats = [example.repeats * config.data.repeats for example in examples]
    return plan_batches(buckets, repeats, per_step=per_step, steps=config.steps, seed=config.seed)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor | list[str]]:
    """Tensors stacked, captions listed."""
    tensors = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "caption"}
    return {**tensors, "captions": [sample["caption"] for sample in samples]}
