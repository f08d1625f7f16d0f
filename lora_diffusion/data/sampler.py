"""Plan the order of training examples.

Orders are functions of a seed, and their beginning does not depend on their length.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Generator

from lora_diffusion.core.seeding import derive_seed
from lora_diffusion.data.buckets import Bucket


def plan_batches(
    sizes: Sequence[Bucket], repeats: Sequence[int], *, per_step: int, steps: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Choose the examples of every optimizer step, so that all examples of a step are from one bucket.

    Each bucket cycles through its examples in a new random order per pass, with each example as often as it repeats.
    A step takes the bucket that is furthest behind its share of the examples, so no bucket is ever off by more than one
    step, and gradient accumulation never sees an incomplete batch. The first steps do not depend on `steps`.

    Args:
        sizes: The bucket of each example.
        repeats: How often each example occurs in one pass.
        per_step: The number of examples per optimizer step.
        steps: The number of optimizer steps.
        seed: The random seed.

    Returns:
        For each step, the indices of `per_step` examples.
    """
    buckets = sorted(set(sizes))
    members = {
        bucket: [i for i, size in enumerate(sizes) if size == bucket for _ in range(repeats[i])] for bucket in buckets
    }
    # Not derived by `derive_seed`: the order is part of recorded runs.
    streams = {bucket: _repeat_shuffled(members[bucket], seed + i) for i, bucket in enumerate(buckets)}
    total, steps_taken = sum(map(len, members.values())), dict.fromkeys(buckets, 0)
    batches: list[tuple[int, ...]] = []
    for step in range(1, steps + 1):
        due = max(buckets, key=lambda bucket: step * len(members[bucket]) / total - steps_taken[bucket])
        steps_taken[due] += 1
        batches.append(tuple(next(streams[due]) for _ in range(per_step)))
    return tuple(batches)


def picture_order(count: int, length: int, seed: int) -> tuple[int, ...]:
    """Return `length` image indices: random permutations of 0..count-1, one after another."""
    return tuple(islice(_repeat_shuffled(range(count), derive_seed(seed, -1)), length))


def _repeat_shuffled(indices: Sequence[int], seed: int) -> Iterator[int]:
    """Yield the indices forever, in a new random order per pass."""
    rng = Generator().manual_seed(seed)
    while True:
        yield from (indices[int(i)] for i in torch.randperm(len(indices), generator=rng))
