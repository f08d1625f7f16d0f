"""Which examples come at which step: all of a step from one bucket, and every example as often as it should."""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator

from lora_diffusion.data.buckets import Bucket


def plan_batches(
    sizes: Sequence[Bucket], repeats: Sequence[int], *, per_step: int, steps: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """`per_step` example numbers for each optimizer step, all of one bucket; the first steps do not depend on `steps`.

    Each bucket goes through its examples again and again, each pass in a new order with every example as often as it
    repeats. A step takes the bucket that is most behind its share, so that no bucket is ever off by more than a step,
    and no window of gradients is ever incomplete.
    """
    names = sorted(set(sizes))
    members = {name: [i for i, size in enumerate(sizes) if size == name for _ in range(repeats[i])] for name in names}
    streams = {name: repeat_shuffled(members[name], seed + place) for place, name in enumerate(names)}
    total, given = sum(map(len, members.values())), dict.fromkeys(names, 0)
    result: list[tuple[int, ...]] = []
    for step in range(1, steps + 1):
        due = max(names, key=lambda name: step * len(members[name]) / total - given[name])
        given[due] += 1
        result.append(tuple(next(streams[due]) for _ in range(per_step)))
    return tuple(result)


def repeat_shuffled(numbers: Sequence[int], seed: int) -> Iterator[int]:
    """Permutations of the numbers, one after another."""
    rng = Generator().manual_seed(seed)
    while True:
        yield from (numbers[i] for i in torch.randperm(len(numbers), generator=rng).tolist())
