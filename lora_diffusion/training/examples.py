"""The order of a run and the randomness of each of its samples, both functions of the seed alone.

Sample k of a run is the same whatever the batch size, the number of processes, or where a run was taken up again.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Sample(TypedDict):
    """One training sample before noise is added."""

    latent: Tensor
    noise: Tensor
    timestep: Tensor
    caption: str


@dataclass(frozen=True, kw_only=True)
class LatentPicture:
    """A picture as the autoencoder sees it: mean and standard deviation of its latents, and its caption."""

    mean: Tensor
    std: Tensor
    caption: str


class RunOfSamples(Dataset[Sample]):
    """Every sample of a run, in order: each epoch a new permutation of the pictures."""

    def __init__(
        self,
        pictures: tuple[LatentPicture, ...],
        *,
        length: int,
        seed: int,
        num_timesteps: int,
        caption_dropout: float,
    ):
        self.pictures = pictures
        self.seed = seed
        self.num_timesteps = num_timesteps
        self.caption_dropout = caption_dropout
        self.order = picture_order(len(pictures), length, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[self.order[index]]
        rng = torch.Generator().manual_seed(sample_seed(self.seed, index))
        dropped = bool(torch.rand((), generator=rng) < self.caption_dropout)
        spread = torch.randn(picture.mean.shape, generator=rng)
        return Sample(
            timestep=torch.randint(self.num_timesteps, (), generator=rng),
            noise=torch.randn(picture.mean.shape, generator=rng),
            latent=picture.mean + picture.std * spread,
            caption="" if dropped else picture.caption,
        )


def sample_seed(seed: int, index: int) -> int:
    """A seed of its own for each sample (a step of splitmix64, so that neighbours are unrelated)."""
    value = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1


def picture_order(count: int, length: int, seed: int) -> tuple[int, ...]:
    """`length` picture numbers: permutations of 0..count-1, one after another."""
    rng = torch.Generator().manual_seed(sample_seed(seed, -1))
    order: list[int] = []
    while len(order) < length:
        order += torch.randperm(count, generator=rng).tolist()
    return tuple(order[:length])


def collate(samples: list[Sample]) -> dict[str, Tensor | list[str]]:
    """Tensors stacked, captions listed."""
    return {
        "latent": torch.stack([s["latent"] for s in samples]),
        "noise": torch.stack([s["noise"] for s in samples]),
        "timestep": torch.stack([s["timestep"] for s in samples]),
        "caption": [s["caption"] for s in samples],
    }
