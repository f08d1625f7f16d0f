"""Random seeds and data order as pure functions of the run's seed.

Sample k of a run is therefore the same for every batch size and number of processes, and also after the run was
resumed.
"""

import torch


def sample_seed(seed: int, index: int) -> int:
    """Derive the seed of one sample from the run's seed.

    Uses one step of splitmix64, so that neighboring indices give unrelated seeds.

    Args:
        seed: Seed of the run.
        index: Index of the sample; negative indices are used for other purposes, such as dropout.

    Returns:
        A seed in [0, 2**63).
    """
    value = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1


def picture_order(count: int, length: int, seed: int) -> tuple[int, ...]:
    """Return `length` image indices: random permutations of 0..count-1, one after another."""
    rng = torch.Generator().manual_seed(sample_seed(seed, -1))
    order: list[int] = []
    while len(order) < length:
        order += torch.randperm(count, generator=rng).tolist()
    return tuple(order[:length])
