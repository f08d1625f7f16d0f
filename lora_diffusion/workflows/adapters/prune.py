"""Adapter files with their smallest numbers set to zero, and what that cost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.adapter import Adapter, cast_adapter
from lora_diffusion.algebra.reduce.prune import Sparsity, measure_sparsity, prune_deltas, prune_factors
from lora_diffusion.architectures.blocks import block_prefix
from lora_diffusion.config.adapter_files import PruneConfig
from lora_diffusion.core.atomic_files import check_output, count_bytes
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.core.tables import format_table
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter

PRUNE = {"factors": prune_factors, "delta": prune_deltas}


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """A pruned file, and the file it was made from."""

    source: Path
    output: Path
    sparsity: Sparsity
    """Of what was written, rounding included."""
    bytes_before: int
    bytes_after: int

    @property
    def block_errors(self) -> dict[str, float]:
        """Relative error in each block: norm of the loss over the norm of the deltas."""
        blocks: dict[str, list[str]] = defaultdict(list)
        for path in self.sparsity.norms:
            blocks[block_prefix(path)].append(path)
        return {block: self.sparsity.error_over(paths) for block, paths in blocks.items()}


def prune_file(source: Path, output: Path, how: PruneConfig) -> PruneResult:
    """Prune an adapter in any dialect and write it in the native layout.

    `keep` as a type gives factors their own type, and a delta that of its layer's first factor. Raises OutputError if
    something is there already or if the output is the input, ConfigError for a share or layers that cannot be pruned,
    or a type that cannot hold them, AdapterFormatError.
    """
    check_output(output, [source], force=how.force)
    before = load_adapter(source)
    if not before.layers:
        raise AdapterFormatError(f"{source}: has no layers to prune; expected a LoRA")
    pruned = PRUNE[how.what](before, how.keep, how.scope)
    after = restore_dtypes(pruned, before) if how.dtype == "keep" else cast_adapter(pruned, torch_dtype(how.dtype))
    if after.non_finite:
        raise ConfigError(f"{source}: {after.non_finite[0]} is beyond the range of its type; choose --dtype float32")
    metadata = before.metadata.model_copy(update={"merged_from": (before.hash,)})
    save_adapter(replace(after, metadata=metadata), output)
    return PruneResult(
        source=source,
        output=output,
        sparsity=measure_sparsity(before, after),
        bytes_before=count_bytes(source),
        bytes_after=count_bytes(output),
    )


def restore_dtypes(pruned: Adapter, before: Adapter) -> Adapter:
    """Cast every factor to the type that its layer had; pruned factors already have it."""
    first = {path: next(iter(layer.factors.values())).dtype for path, layer in before.layers.items()}
    layers = {
        path: layer.with_factors({name: factor.to(first[path]) for name, factor in layer.factors.items()})
        if layer.kind == "full"
        else layer
        for path, layer in pruned.layers.items()
    }
    return replace(pruned, layers=layers)


def to_json(done: PruneResult) -> dict[str, Any]:
    """Return the result as plain values, ready for JSON."""
    return {
        "from": str(done.source),
        "to": str(done.output),
        "nonzeros": done.sparsity.nonzeros,
        "entries": done.sparsity.entries,
        "share": done.sparsity.share,
        "error": done.sparsity.error,
        "block_errors": done.block_errors,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
    }


def format_report(done: PruneResult) -> str:
    """Format the result as lines of text."""
    found = done.sparsity
    lines = [
        f"{done.output}: {found.nonzeros:,} of {found.entries:,} numbers are not zero ({found.share:.2%})",
        f"{done.bytes_before:,} bytes before, {done.bytes_after:,} after; zeros are stored like other numbers",
        f"error of the deltas: {found.error:.3g} of their norm",
    ]
    rows = [[block, f"{error:.3g}"] for block, error in done.block_errors.items()]
    return "\n".join([*lines, format_table(["block", "error"], rows)])
