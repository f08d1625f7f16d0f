"""The order of a run and the randomness of each of its samples, both functions of the seed alone.

Sample k of a run is the same whatever the batch size, the number of processes, or where a run was taken up again.
"""

import torch


def sample_seed(seed: int, index: int) -> int:
    """A seed of its own for each sample (a step of splitmix64, so that neighbors are unrelated)."""
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
