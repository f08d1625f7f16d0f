"""Pruning of adapter files: set the smallest values to zero, and measure the error."""

from __future__ import annotations

import os
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

_PRUNE = {"factors": prune_factors, "delta": prune_deltas}


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """A pruned adapter file."""

    source: Path
    """The file that was read."""
    output: Path
    """The file that was written."""
    sparsity: Sparsity
    """Fraction of nonzero values and error of the written file, rounding included."""
    bytes_before: int
    """Size of the file that was read."""
    bytes_after: int
    """Size of the written file."""

    @property
    def block_errors(self) -> dict[str, float]:
        """Relative error in each block: norm of the change of the deltas divided by the norm of the deltas."""
        blocks: dict[str, list[str]] = defaultdict(list)
        for path in self.sparsity.norms:
            blocks[block_prefix(path)].append(path)
        return {block: self.sparsity.error_over(paths) for block, paths in blocks.items()}


def prune_file(source: str | os.PathLike[str], output: str | os.PathLike[str], config: PruneConfig) -> PruneResult:
    """Prune an adapter file of any format and write it in the native format.

    Args:
        source: The adapter file.
        output: The .safetensors file to write.
        config: Settings. With the dtype `keep`, factors keep their type and a delta has that of its layer's first
            factor.

    Raises:
        OutputError: If `output` is the input, exists without `config.force`, or cannot be written.
        ConfigError: If the fraction is invalid, a layer cannot be pruned, or the type cannot represent a value.
        AdapterFormatError: If the file cannot be read or has no layers.
    """
    source, output = Path(source), Path(output)
    check_output(output, [source], force=config.force)
    before = load_adapter(source)
    if not before.layers:
        raise AdapterFormatError(f"{source}: has no layers to prune; expected a LoRA")
    pruned = _PRUNE[config.what](before, config.keep, config.scope)
    after = (
        _restore_dtypes(pruned, before) if config.dtype == "keep" else cast_adapter(pruned, torch_dtype(config.dtype))
    )
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


def _restore_dtypes(pruned: Adapter, before: Adapter) -> Adapter:
    """Cast every factor to the type that its layer had; pruned factors already have it."""
    first = {path: next(iter(layer.factors.values())).dtype for path, layer in before.layers.items()}
    layers = {
        path: layer.with_factors({name: factor.to(first[path]) for name, factor in layer.factors.items()})
        if layer.kind == "full"
        else layer
        for path, layer in pruned.layers.items()
    }
    return replace(pruned, layers=layers)


def to_json(result: PruneResult) -> dict[str, Any]:
    """Return the result of pruning as plain values, ready for JSON."""
    return {
        "from": str(result.source),
        "to": str(result.output),
        "nonzeros": result.sparsity.nonzeros,
        "entries": result.sparsity.entries,
        "share": result.sparsity.share,
        "error": result.sparsity.error,
        "block_errors": result.block_errors,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
    }


def format_report(result: PruneResult) -> str:
    """Format the result of pruning as lines of text."""
    sparsity = result.sparsity
    lines = [
        f"{result.output}: {sparsity.nonzeros:,} of {sparsity.entries:,} values are not zero ({sparsity.share:.2%})",
        f"{result.bytes_before:,} bytes before, {result.bytes_after:,} after; zeros are stored like other values",
        f"error of the deltas: {sparsity.error:.3g} of their norm",
    ]
    rows = [[block, f"{error:.3g}"] for block, error in result.block_errors.items()]
    return "\n".join([*lines, format_table(["block", "error"], rows)])
