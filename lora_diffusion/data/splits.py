"""Split a dataset into training and validation examples."""

from collections.abc import Sequence

from lora_diffusion.core.atomic_files import prefixed_file_hash
from lora_diffusion.data.folder import Example
from lora_diffusion.errors import DatasetError


def split_validation(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split examples into a training set and a validation set.

    The choice depends on the contents of the images, not on their names or order.

    Args:
        examples: All examples.
        share: The fraction of examples for validation; 0 for none, or else at least one example goes to each set.
        seed: The random seed.

    Returns:
        The training examples and the validation examples.

    Raises:
        DatasetError: If there are fewer than two examples to split.
    """
    if share == 0:
        return tuple(examples), ()
    if len(examples) < 2:
        raise DatasetError(
            "a validation split needs at least two images, but the dataset has only one; add images, or set "
            "validation.share to 0"
        )
    count = min(len(examples) - 1, max(1, round(share * len(examples))))
    ranked = sorted(examples, key=lambda example: _split_key(example, seed))
    validation = {example.picture for example in ranked[:count]}
    return (
        tuple(example for example in examples if example.picture not in validation),
        tuple(example for example in examples if example.picture in validation),
    )


def _split_key(example: Example, seed: int) -> str:
    """Return the pseudo-random sort key of an example; the split is part of recorded runs, so it must not change."""
    return prefixed_file_hash(example.picture, f"{seed}".encode())
