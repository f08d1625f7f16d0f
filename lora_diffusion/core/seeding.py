"""Independent random numbers for each sample, step, module and tensor, derived from the seed of a run.

Everything random draws from a generator of its own, so no result depends on the order of computation, the batch size,
the number of processes, or interruptions.
"""

import hashlib

import torch

_BITS = 2**64 - 1


def derive_seed(seed: int, key: int | str) -> int:
    """Derive a seed from the seed of a run and a key.

    An integer key, such as the index of a sample, takes one step of splitmix64 [doi:10.1145/2660193.2660195], so that
    neighboring keys give unrelated seeds. A string, such as a module path, is hashed with SHA-256. Both formulas are
    part of every recorded run: a change would break the replay of recipes and the resumption of stopped runs.

    Args:
        seed: Seed of the run.
        key: What the seed is for. Samples have the keys from 0; negative integers are for other streams of a run, and
            strings for what has a name.

    Returns:
        A seed in [0, 2**63).
    """
    if isinstance(key, str):
        return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "little") >> 1
    value = (seed * 0x9E3779B97F4A7C15 + key * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return (value ^ (value >> 31)) >> 1


def make_generator(seed: int, key: int | str) -> torch.Generator:
    """Make a CPU generator that is seeded with `derive_seed(seed, key)`."""
    return torch.Generator().manual_seed(derive_seed(seed, key))
