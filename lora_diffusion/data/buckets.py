"""Aspect-ratio buckets: sizes of about one area, so that pictures keep their shape and batches have one.

After NovelAI's aspect-ratio bucketing (2022).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


def bucket_sizes(resolution: int, step: int, largest_aspect: float) -> tuple[Bucket, ...]:
    """The square, and for each width the tallest bucket whose area is no larger, and each of those on its side.

    Sides are multiples of `step`; no side is over `largest_aspect` times the other.
    """
    square = Bucket(resolution, resolution)
    found = {square}
    for width in range(step, resolution + 1, step):
        height = resolution**2 // width // step * step
        if height / width <= largest_aspect:
            found |= {Bucket(width, height), Bucket(height, width)}
    return tuple(sorted(found))


def nearest_bucket(buckets: Sequence[Bucket], width: int, height: int) -> Bucket:
    """The bucket whose shape is nearest to a picture's, by the ratio of aspects; of equal ones the largest."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (round(abs(math.log(b.aspect) - aspect), 9), -b.width * b.height))
