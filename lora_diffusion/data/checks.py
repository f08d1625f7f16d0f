"""What a folder of training data holds, and what in it may go wrong, as plain values."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.config.train import DataConfig
from lora_diffusion.data.buckets import Bucket, bucket_sizes, nearest_bucket
from lora_diffusion.data.duplicates import find_near_duplicates, hash_file
from lora_diffusion.data.folder import Example, read_dataset
from lora_diffusion.data.images import read_size

NOTATION = re.compile(r"\\[()\[\]]|:\s*[+-]?[\d.]+\s*\)|\bBREAK\b")
"""What a caption has that was written as a prompt."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """A folder as training sees it."""

    examples: tuple[Example, ...]
    buckets: tuple[Bucket, ...]
    """Of each example."""
    enlarged: tuple[Path, ...]
    """Pictures smaller than their bucket, which are scaled up and look soft."""
    twins: tuple[tuple[Path, Path], ...]
    """Pictures that look the same."""
    long: tuple[tuple[Path, int], ...]
    """Captions longer than a text encoder reads at once, and in how many chunks they are read."""
    notation: tuple[Path, ...]
    """Captions with weights or escaped brackets, which are read to the letter unless asked for."""
    untriggered: tuple[Path, ...]
    """Captions without the trigger word."""

    @property
    def samples_per_epoch(self) -> int:
        """Pictures in one pass over the data, repeats included."""
        return sum(example.repeats for example in self.examples)

    @property
    def has_single_caption(self) -> bool:
        """Whether all pictures have the same caption."""
        return len({example.caption for example in self.examples}) == 1


def check_dataset(
    config: DataConfig, *, size_px: int, count_chunks: Callable[[str], int], trigger: str = ""
) -> DatasetReport:
    """Read a folder and look at it. Raises DatasetError for what training would refuse."""
    examples = read_dataset(config)
    sizes = [read_size(example.picture) for example in examples]
    buckets = assign_buckets(sizes, config, size_px)
    counts = [(example.picture, count_chunks(example.caption)) for example in examples]
    return DatasetReport(
        examples=examples,
        buckets=buckets,
        enlarged=tuple(
            example.picture
            for example, (width, height), bucket in zip(examples, sizes, buckets, strict=True)
            if width < bucket.width or height < bucket.height
        ),
        twins=find_near_duplicates({example.picture: hash_file(example.picture) for example in examples}),
        long=tuple((picture, count) for picture, count in counts if count > 1),
        notation=tuple(e.picture for e in examples if NOTATION.search(e.caption)),
        untriggered=tuple(e.picture for e in examples if trigger and trigger not in e.caption),
    )


def assign_buckets(sizes: Sequence[tuple[int, int]], config: DataConfig, size_px: int) -> tuple[Bucket, ...]:
    """The bucket of each picture of those widths and heights."""
    if not config.buckets:
        return (Bucket(size_px, size_px),) * len(sizes)
    step = config.bucket_step or max(8, size_px // 64 * 8)
    known = bucket_sizes(size_px, step, config.largest_aspect)
    return tuple(nearest_bucket(known, *size) for size in sizes)


def format_report(report: DatasetReport) -> str:
    """The report as lines of text: what is there, then what to look at."""
    kinds = sorted(Counter(report.buckets).items())
    lines = [
        f"{len(report.examples)} pictures, {report.samples_per_epoch} shown in a pass; "
        + ", ".join(f"{count} as {bucket.width}x{bucket.height}" for bucket, count in kinds)
    ]
    lines += [f"look the same: {a.name} and {b.name}; keep one, or both learn as twice" for a, b in report.twins]
    lines += [f"is enlarged, and looks soft: {path.name}" for path in report.enlarged]
    lines += [f"caption is long, and read in {count} chunks: {path.name}" for path, count in report.long]
    lines += [
        f"caption has weights, escapes or BREAK, which are read only with captions.weights: {path.name}"
        for path in report.notation
    ]
    lines += [f"caption lacks the trigger word: {path.name}" for path in report.untriggered]
    if report.has_single_caption and len(report.examples) > 1:
        lines.append("all captions are the same: right for a subject, but a style learns better from what differs")
    return "\n".join(lines if len(lines) > 1 else [*lines, "nothing to complain of"])


def to_json(report: DatasetReport) -> dict[str, object]:
    """The same as plain values, ready for JSON."""
    return {
        "pictures": len(report.examples),
        "shown_per_pass": report.samples_per_epoch,
        "buckets": {f"{b.width}x{b.height}": count for b, count in sorted(Counter(report.buckets).items())},
        "twins": [[str(a), str(b)] for a, b in report.twins],
        "enlarged": [str(path) for path in report.enlarged],
        "long_captions": {str(path): count for path, count in report.long},
        "notation": [str(path) for path in report.notation],
        "without_trigger": [str(path) for path in report.untriggered],
        "one_caption": report.has_single_caption,
    }
