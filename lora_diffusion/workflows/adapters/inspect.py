"""Contents of an adapter file as plain values, from its header or from its tensors."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

from lora_diffusion.adapters.adapter import Adapter, adapter_hash, named_tensors
from lora_diffusion.algebra.metrics.norms import delta_norm
from lora_diffusion.architectures.blocks import block_prefix
from lora_diffusion.architectures.families import family_title
from lora_diffusion.core.atomic_files import count_bytes
from lora_diffusion.core.dtypes import dtype_name
from lora_diffusion.core.tables import format_table
from lora_diffusion.formats.adapters.load import load_meta_adapter, load_unchecked
from lora_diffusion.formats.adapters.metadata import tag_frequencies
from lora_diffusion.formats.adapters.pickle import is_pickled
from lora_diffusion.formats.safetensors import file_and_payload_hash

_MAX_TAGS = 20
"""Maximum number of caption tags in a report; the most frequent ones."""
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000
"""The range of a file that kohya's legacy hash covers."""


def inspect_adapter(path: str | os.PathLike[str], *, norms: bool = False, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Describe an adapter file: format, kind, family, sizes, trigger words and training metadata.

    Args:
        path: The adapter file.
        norms: Whether the tensors are read as well, for the norms of the deltas, dead layers, NaN and hashes. By
            default only the header is read.
        ignore: Patterns of keys that the file may contain although they are not understood.

    Returns:
        Plain values, ready for JSON.

    Raises:
        AdapterFormatError: If the file cannot be read or is not an adapter.
    """
    path = Path(path)
    adapter = (load_unchecked if norms else load_meta_adapter)(path, ignore=ignore)
    metadata = adapter.metadata
    training = dict(metadata.training)
    tags = tag_frequencies(training)
    training.pop("ss_tag_frequency", None)
    report = {
        "file": str(path),
        "bytes": count_bytes(path),
        "name": metadata.name,
        "dialect": metadata.source_format,
        "kind": ", ".join(adapter.kinds),
        "family": family_title(metadata.family) or "unknown",
        "variant": metadata.variant,
        "base": metadata.base_name,
        "base_hash": metadata.base_hash,
        "trigger_words": list(metadata.trigger_words),
        "learned_tokens": {word: {c: list(v.shape) for c, v in t.items()} for word, t in adapter.tokens.items()},
        "parameters": adapter.num_parameters,
        "precision": sorted({dtype_name(tensor.dtype) for _, tensor in named_tensors(adapter)}),
        "ranks": _summarize_range(
            value for layer in adapter.layers.values() if (value := getattr(layer, "rank", None))
        ),
        "alphas": _summarize_range(
            v for layer in adapter.layers.values() if (v := getattr(layer, "alpha", None)) is not None
        ),
        "components": dict(Counter(path.split(".", 1)[0] for path in adapter.paths)),
        "blocks": dict(Counter(block_prefix(path) for path in adapter.paths)),
        "tags": dict(list(tags.items())[:_MAX_TAGS]),
        "training": training,
        "description": metadata.description,
        "created": metadata.created,
        "notes": list(metadata.notes),
    }
    return report | (_measure_norms(adapter, path) if norms else {})


def _summarize_range(values: Iterable[float]) -> dict[str, float]:
    """Return the smallest, median and largest value; empty for no values."""
    ordered = sorted(values)
    return {"min": ordered[0], "median": median(ordered), "max": ordered[-1]} if ordered else {}


def _measure_norms(adapter: Adapter, path: Path) -> dict[str, Any]:
    """Return what requires the tensors: hashes, norms, dead layers and tensors with NaN or infinity."""
    norms = {layer_path: delta_norm(layer) for layer_path, layer in adapter.layers.items()}
    report: dict[str, Any] = {
        "hash": adapter_hash(adapter),
        "norms": _summarize_block_norms(norms),
        "no_norm": sorted(layer_path for layer_path, norm in norms.items() if norm is None),
        "dead": sorted(layer_path for layer_path, norm in norms.items() if norm == 0),
        "non_finite": list(adapter.non_finite),
    }
    return report | (file_hashes(path) if path.is_file() and not is_pickled(path) else {})


def _summarize_block_norms(norms: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """Return the median and largest delta norm in each block."""
    blocks: dict[str, list[float]] = {}
    for path, norm in norms.items():
        if norm is not None:
            blocks.setdefault(block_prefix(path), []).append(norm)
    return {block: {"median": median(found), "max": max(found)} for block, found in blocks.items()}


def file_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
    """Compute the hashes by which websites and user interfaces identify a file.

    Returns:
        `autov2`, the first ten digits of the SHA-256 of the file, as on Civitai; `sshs_model_hash`, the SHA-256 of the
        bytes after the header; `sshs_legacy_hash`, the first eight digits of the SHA-256 of 64 KiB after the first
        mebibyte. The last two are those of kohya's scripts [github.com/kohya-ss/sd-scripts, library/train_util.py].
    """
    path = Path(path)
    with path.open("rb") as file:
        file.seek(_LEGACY_START)
        legacy = hashlib.sha256(file.read(_LEGACY_BYTES)).hexdigest()
    whole, payload = file_and_payload_hash(path)
    return {"autov2": whole[:10], "sshs_model_hash": payload, "sshs_legacy_hash": legacy[:8]}


def describe_inspection(report: Mapping[str, Any]) -> str:
    """Format the result of `inspect_adapter` as a table, followed by one with a bar for the norm of each block."""
    rows = [
        (key.replace("_", " "), _format_value(value))
        for key, value in report.items()
        if key != "norms" and value not in ("", [], {}, None)
    ]
    lines = [format_table([], rows, left=(0, 1))]
    if report.get("norms"):
        lines += ["delta norms by block, median (largest):", _format_bars(report["norms"])]
    return "\n".join(lines)


def _format_value(value: Any) -> str:
    """Format a value of the report on one line."""
    if isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value).items()
        return ", ".join(f"{key}: {_format_value(inner)}" for key, inner in items)
    if isinstance(value, list):
        return ", ".join(map(str, cast(list[object], value)))
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _format_bars(norms: Mapping[str, Mapping[str, float]], width: int = 40) -> str:
    """Format one line for each block: name, bar, numbers."""
    longest = max((entry["median"] for entry in norms.values()), default=0) or 1
    rows = [
        (f"  {block}", "█" * round(width * entry["median"] / longest), f"{entry['median']:.4g} ({entry['max']:.4g})")
        for block, entry in norms.items()
    ]
    return format_table([], rows, left=(0, 1, 2))
