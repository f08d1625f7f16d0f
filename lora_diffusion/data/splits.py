"""Examples that are held out of training, to see whether it still gets better."""

import hashlib
from collections.abc import Sequence

from lora_diffusion.data.folder import Example
from lora_diffusion.errors import DatasetError


def split_validation(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Those to train on and those held out, at least one of each; by content, whatever names and order.

    Raises DatasetError for fewer than two examples.
    """
    if share == 0:
        return tuple(examples), ()
    if len(examples) < 2:
        raise DatasetError("one picture cannot be trained on and held out; give more, or set validation.share to 0")
    count = min(len(examples) - 1, max(1, round(share * len(examples))))
    ranked = sorted(examples, key=lambda example: split_key(example, seed))
    chosen = {example.picture for example in ranked[:count]}
    return (
        tuple(example for example in examples if example.picture not in chosen),
        tuple(example for example in examples if example.picture in chosen),
    )


def split_key(example: Example, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}".encode() + example.picture.read_bytes()).digest()
