"""Aspect-ratio buckets: image sizes of about the same area, so that images of similar shape share a batch.

This is NovelAI's aspect-ratio bucketing (2022).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """An image size in pixels."""

    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.width / self.height


def bucket_sizes(resolution: int, step: int, max_aspect_ratio: float) -> tuple[Bucket, ...]:
    """List the buckets for a training resolution.

    They are the square, for each smaller width the tallest bucket that has no larger area, and the transpose of each.

    Args:
        resolution: Side of the square in pixels.
        step: All widths and heights are multiples of this.
        max_aspect_ratio: The greatest ratio of the longer to the shorter side.
    """
    square = Bucket(resolution, resolution)
    buckets = {square}
    for width in range(step, resolution + 1, step):
        height = resolution**2 // width // step * step
        if height / width <= max_aspect_ratio:
            buckets |= {Bucket(width, height), Bucket(height, width)}
    return tuple(sorted(buckets))


def nearest_bucket(buckets: Sequence[Bucket], width: int, height: int) -> Bucket:
    """Return the bucket whose aspect ratio is nearest to an image's, and the largest of several equally near ones."""
    log_aspect = math.log(width / height)
    return min(buckets, key=lambda b: (round(abs(math.log(b.aspect) - log_aspect), 9), -b.width * b.height))
