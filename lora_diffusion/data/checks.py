"""Check a training folder for common problems before training: duplicates, small images, long captions."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.config.train import DataConfig
from lora_diffusion.data.buckets import Bucket, bucket_sizes, nearest_bucket
from lora_diffusion.data.duplicates import find_near_duplicates, image_difference_hash
from lora_diffusion.data.folder import Example, read_dataset
from lora_diffusion.data.images import read_size

_PROMPT_SYNTAX = re.compile(r"\\[()\[\]]|:\s*[+-]?[\d.]+\s*\)|\bBREAK\b")
r"""Matches A1111 prompt syntax in a caption: escaped brackets such as `\(`, weights such as `:1.3)`, and BREAK."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """The contents of a training folder and its problems."""

    examples: tuple[Example, ...]
    """All images with their captions, sorted by path."""
    buckets: tuple[Bucket, ...]
    """The aspect-ratio bucket of each example."""
    upscaled: tuple[Path, ...]
    """Images that are smaller than their bucket, so that training upscales them."""
    duplicates: tuple[tuple[Path, Path], ...]
    """Pairs of images that look the same."""
    long_captions: tuple[tuple[Path, int], ...]
    """Images whose caption needs more than one chunk of 75 tokens, with the number of chunks."""
    with_prompt_syntax: tuple[Path, ...]
    """Images whose caption contains weights, escaped brackets or BREAK."""
    without_trigger: tuple[Path, ...]
    """Images whose caption lacks the trigger word."""

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples in one epoch, with repeats."""
        return sum(example.repeats for example in self.examples)

    @property
    def has_single_caption(self) -> bool:
        """Whether all images have the same caption."""
        return len({example.caption for example in self.examples}) == 1


def check_dataset(
    config: DataConfig, *, size_px: int, count_chunks: Callable[[str], int], trigger: str = ""
) -> DatasetReport:
    """Read a training folder and look for problems.

    Args:
        config: The data settings.
        size_px: The training resolution in pixels.
        count_chunks: Returns the number of chunks of 75 tokens that a caption needs.
        trigger: The trigger word that captions should contain; empty to skip this check.

    Raises:
        DatasetError: If training would refuse the folder.
    """
    examples = read_dataset(config)
    sizes = [read_size(example.picture) for example in examples]
    buckets = assign_buckets(sizes, config, size_px)
    counts = [(example.picture, count_chunks(example.caption)) for example in examples]
    return DatasetReport(
        examples=examples,
        buckets=buckets,
        upscaled=tuple(
            example.picture
            for example, (width, height), bucket in zip(examples, sizes, buckets, strict=True)
            if width < bucket.width or height < bucket.height
        ),
        duplicates=find_near_duplicates({e.picture: image_difference_hash(e.picture) for e in examples}),
        long_captions=tuple((picture, count) for picture, count in counts if count > 1),
        with_prompt_syntax=tuple(e.picture for e in examples if _PROMPT_SYNTAX.search(e.caption)),
        without_trigger=tuple(e.picture for e in examples if trigger and trigger not in e.caption),
    )


def assign_buckets(sizes: Sequence[tuple[int, int]], config: DataConfig, size_px: int) -> tuple[Bucket, ...]:
    """Assign each image, given by width and height in pixels, to an aspect-ratio bucket.

    Without bucketing, every image gets the square of `size_px` pixels.
    """
    if not config.buckets:
        return (Bucket(size_px, size_px),) * len(sizes)
    step = config.bucket_step or max(8, size_px // 64 * 8)
    buckets = bucket_sizes(size_px, step, config.max_aspect_ratio)
    return tuple(nearest_bucket(buckets, *size) for size in sizes)


def format_report(report: DatasetReport) -> str:
    """Format a report as text: a summary line, then one line for each problem."""
    bucket_counts = sorted(Counter(report.buckets).items())
    lines = [
        f"{len(report.examples)} images, {report.samples_per_epoch} samples per epoch; "
        + ", ".join(f"{count} as {bucket.width}x{bucket.height}" for bucket, count in bucket_counts)
    ]
    lines += [
        f"near duplicates: {a.name} and {b.name}; remove one, or it counts twice in training"
        for a, b in report.duplicates
    ]
    lines += [f"smaller than its bucket, will be upscaled: {path.name}" for path in report.upscaled]
    lines += [f"long caption, split into {count} chunks: {path.name}" for path, count in report.long_captions]
    lines += [
        f"caption has weights, escaped brackets or BREAK, which have no effect without captions.weights: {path.name}"
        for path in report.with_prompt_syntax
    ]
    lines += [f"caption lacks the trigger word: {path.name}" for path in report.without_trigger]
    if report.has_single_caption and len(report.examples) > 1:
        lines.append("all captions are the same: suitable for a subject, but a style needs captions that differ")
    return "\n".join(lines if len(lines) > 1 else [*lines, "no problems found"])


def to_json(report: DatasetReport) -> dict[str, object]:
    """Convert a report to a dictionary of JSON values."""
    return {
        "images": len(report.examples),
        "samples_per_epoch": report.samples_per_epoch,
        "buckets": {f"{b.width}x{b.height}": count for b, count in sorted(Counter(report.buckets).items())},
        "duplicates": [[str(a), str(b)] for a, b in report.duplicates],
        "upscaled": [str(path) for path in report.upscaled],
        "long_captions": {str(path): count for path, count in report.long_captions},
        "with_prompt_syntax": [str(path) for path in report.with_prompt_syntax],
        "without_trigger": [str(path) for path in report.without_trigger],
        "has_single_caption": report.has_single_caption,
    }
