"""Combination of adapter files into one, exactly or at a lower rank; a single file is resized."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, cast_adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.coefficients import is_zero
from lora_diffusion.adapters.layers import DoRALayer, FullLayer
from lora_diffusion.algebra.combine.exact_sum import combine, joint_sum, merge_tokens
from lora_diffusion.algebra.combine.methods import combine_by_consensus
from lora_diffusion.algebra.metrics.rounding_error import adapter_rounding_error
from lora_diffusion.algebra.reduce.resize import CompressionReport, Loss, compress
from lora_diffusion.algebra.reduce.truncate import truncate_adapter
from lora_diffusion.architectures.blocks import block_prefix
from lora_diffusion.architectures.module_paths import LAYOUTS
from lora_diffusion.config.combine import CombineConfig
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.core.atomic_files import check_output, count_bytes
from lora_diffusion.core.dtypes import dtype_name, torch_dtype
from lora_diffusion.core.tables import format_table
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.library.recipe import blend_entries
from lora_diffusion.library.references import load_blend

_STALE_KOHYA_KEYS = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
"""Keys of kohya's metadata that describe the factors and do not apply to the combined ones."""


@dataclass(frozen=True, kw_only=True)
class CombineResult:
    """A combined adapter file."""

    sources: tuple[Path, ...]
    """The files that were read."""
    output: Path
    """The file that was written."""
    config: CombineConfig
    """The settings."""
    adapter: Adapter
    """Content of the written file."""
    report: CompressionReport | None
    """Error of the reduction of ranks; None for an exact sum."""
    rounding_error: float
    """Norm of the change of the deltas by rounding to the written type, divided by the norm of the deltas."""
    bytes_before: int
    """Size of all files that were read."""
    bytes_after: int
    """Size of the written file."""


def combine_files(
    entries: Sequence[BlendEntry], output: str | os.PathLike[str], config: CombineConfig
) -> CombineResult:
    """Combine adapter files of any format into a native file, or resize a single one.

    Args:
        entries: The adapters by path, with weights.
        output: The .safetensors file to write.
        config: Settings: how the adapters are combined, and the rank of the result.

    Raises:
        OutputError: If `output` is an input, exists without `config.force`, or cannot be written.
        ConfigError: If all weights are 0, layers cannot be combined, or the type cannot represent a value.
        FamilyMismatchError: If the adapters are for different families, or do not fit `config.base`.
        AdapterFormatError: If a file cannot be read.
    """
    output = Path(output)
    sources = tuple(dict.fromkeys(Path(entry.path) for entry in entries))
    check_output(output, sources, force=config.force)
    blend = load_blend(entries, ignore=config.ignore_unmatched).blend
    active = [entry for entry in blend.entries if not is_zero(entry.weight)]
    if not active:
        raise ConfigError("nothing to combine; give at least one adapter with a weight other than 0")
    exact, report = _combine_blend(_materialize_dora(blend, config.base) if config.base else blend, config)
    dtype = _find_common_dtype(active) if config.dtype == "keep" else torch_dtype(config.dtype)
    rounded = replace(cast_adapter(exact, dtype), tokens=exact.tokens)
    if rounded.non_finite:
        raise ConfigError(
            f"{rounded.non_finite[0]} is beyond the range of {dtype_name(dtype)}; lower the weights, or choose "
            "bfloat16 or float32"
        )
    error = adapter_rounding_error(exact, rounded)
    metadata = _merge_metadata(active, output.stem).model_copy(
        update={"training": _make_record(active, config, report, error)}
    )
    written = replace(rounded, metadata=metadata)
    save_adapter(written, output)
    return CombineResult(
        sources=sources,
        output=output,
        config=config,
        adapter=written,
        report=report,
        rounding_error=error,
        bytes_before=sum(map(count_bytes, sources)),
        bytes_after=count_bytes(output),
    )


def _combine_blend(blend: Blend, config: CombineConfig) -> tuple[Adapter, CompressionReport | None]:
    """Combine a blend into one adapter in float32 by the method in the settings."""
    family = next((e.adapter.metadata.family for e in blend.active if e.adapter.metadata.family), "")
    layout = LAYOUTS.get(family)
    if config.consensus:
        blend = Blend(
            entries=(WeightedAdapter(adapter=combine_by_consensus(blend, config.consensus, AdapterMetadata(), layout)),)
        )
    if config.first is not None:
        return truncate_adapter(combine(_disable_timestep_ranks(blend), AdapterMetadata(), layout), config.first)
    if config.rule is None:
        return combine(blend, AdapterMetadata(), layout), None
    adapter, report = compress(joint_sum(blend, layout), config.rule, AdapterMetadata())
    return replace(adapter, tokens=merge_tokens(blend)), report


def _materialize_dora(blend: Blend, base: str) -> Blend:
    """Replace each DoRA layer by the difference that it makes to the weight of the base.

    The weight is that of the unchanged base, as in a blend, where no adapter is applied on top of another.
    """
    from lora_diffusion.models.locate import find_matching_checkpoint  # slow to import, and nothing else here needs it

    parameters = find_matching_checkpoint(base, blend).parameters

    def materialize(adapter: Adapter) -> Adapter:
        changed = {
            path: FullLayer(diff=layer.delta(parameters[f"{path}.weight"].read()))
            for path, layer in adapter.layers.items()
            if isinstance(layer, DoRALayer)
        }
        return replace(adapter, layers={**adapter.layers, **changed})

    return Blend(entries=tuple(replace(entry, adapter=materialize(entry.adapter)) for entry in blend.entries))


def _find_common_dtype(entries: Sequence[WeightedAdapter]) -> torch.dtype:
    """Return the type of all layers and biases if it is the same half-precision type, else float32."""
    adapters = [entry.adapter for entry in entries]
    dtypes = {
        factor.dtype for adapter in adapters for layer in adapter.layers.values() for factor in layer.factors.values()
    }
    dtypes |= {bias.dtype for adapter in adapters for bias in adapter.biases.values()}
    return dtypes.pop() if dtypes in ({torch.float16}, {torch.bfloat16}) else torch.float32


def _merge_metadata(entries: Sequence[WeightedAdapter], name: str) -> AdapterMetadata:
    """Merge the metadata of all adapters: values that differ are left empty, trigger words are concatenated."""
    all_metadata = [entry.adapter.metadata for entry in entries]

    def common_value(field: str) -> str:
        values = {getattr(metadata, field) for metadata in all_metadata} - {""}
        return values.pop() if len(values) == 1 else ""

    variants = sorted({metadata.variant or "none" for metadata in all_metadata})
    variant_notes: tuple[str, ...] = ()
    if len(variants) > 1:
        variant_notes = (f"combined from adapters for bases of different variants ({', '.join(variants)})",)
    return AdapterMetadata(
        name=name,
        family=common_value("family"),
        base_name=common_value("base_name"),
        base_hash=common_value("base_hash"),
        description=common_value("description"),
        variant=all_metadata[0].variant if len(variants) == 1 else "",
        trigger_words=tuple(dict.fromkeys(word for metadata in all_metadata for word in metadata.trigger_words)),
        created=all_metadata[0].created if len(all_metadata) == 1 else "",
        notes=tuple(dict.fromkeys((*(note for metadata in all_metadata for note in metadata.notes), *variant_notes))),
        merged_from=tuple(f"{entry.name} ({entry.hash[:16]})" for entry in entries),
    )


def _disable_timestep_ranks(blend: Blend) -> Blend:
    """Return the blend with the full rank of each T-LoRA at all timesteps."""

    def disable(adapter: Adapter) -> Adapter:
        return replace(adapter, metadata=adapter.metadata.model_copy(update={"min_rank": 0}))

    return Blend(entries=tuple(replace(entry, adapter=disable(entry.adapter)) for entry in blend.entries))


def _make_record(
    entries: Sequence[WeightedAdapter], config: CombineConfig, report: CompressionReport | None, rounding: float
) -> dict[str, Any]:
    """Return the training metadata of the output: how it was combined, and a single adapter's own training."""
    training = dict(entries[0].adapter.metadata.training) if len(entries) == 1 else {}
    parts = [
        {"file": Path(part.path).name, **part.model_dump(mode="json", include={"name", "hash", "weight"})}
        for part in blend_entries(Blend(entries=tuple(entries)))
    ]
    record = {
        "adapters": parts,
        "rule": _describe_rule(config),
        "consensus": config.consensus.model_dump() if config.consensus else None,
        "relative_error": 0.0 if report is None else report.total.relative,
        "rounding_error": rounding,
        "base": config.base,
    }
    return {key: value for key, value in training.items() if key not in _STALE_KOHYA_KEYS} | {"combination": record}


def _describe_rule(config: CombineConfig) -> str:
    """Describe how ranks were chosen, for the metadata."""
    if config.first is not None:
        return f"first {config.first}"
    return "exact" if config.rule is None else str(config.rule)


def to_json(result: CombineResult) -> dict[str, Any]:
    """Return the result of a combination as plain values, ready for JSON."""
    summary = {
        "from": [str(source) for source in result.sources],
        "to": str(result.output),
        "layers": len(result.adapter.layers),
        "rounding_error": result.rounding_error,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "exact": result.report is None and result.config.consensus is None,
    }
    if result.report is None:
        return summary
    blocks = {block: loss_to_json(loss) for block, loss in result.report.by_group(block_prefix).items()}
    modules = {path: asdict(loss) for path, loss in result.report.modules.items()}
    return {**summary, **loss_to_json(result.report.total), "blocks": blocks, "by_module": modules}


def loss_to_json(loss: Loss) -> dict[str, Any]:
    """Return the error of a group of modules as plain values, ready for JSON."""
    return {**asdict(loss), "error": loss.relative}


def format_report(result: CombineResult) -> str:
    """Format the result of a combination as text, with a table of errors by block."""
    before, after = format_megabytes(result.bytes_before), format_megabytes(result.bytes_after)
    sizes = f"{len(result.adapter.layers)} layers, {before} before, {after} after"
    rounding = f"rounding changed the delta by {result.rounding_error:.2%}"
    if result.report is None:
        method = f"combined by {result.config.consensus.method}" if result.config.consensus else "the sum is exact"
        return f"{result.output}: {sizes}; {method}, {rounding}"
    rows = [*result.report.by_group(block_prefix).items(), ("all", result.report.total)]
    cells = [
        [
            name,
            str(loss.modules),
            format_range(loss.ranks_before),
            format_range(loss.ranks_after),
            f"{loss.norm:.4g}",
            f"{loss.relative:.3g}",
        ]
        for name, loss in rows
    ]
    table = format_table(["block", "modules", "old rank", "new rank", "norm", "error"], cells)
    return f"{result.output}: {sizes}; {rounding}\n{table}"


def format_range(ranks: tuple[int, int]) -> str:
    """Format the lowest and the highest rank, as `4-16`; as `4` if they are equal."""
    low, high = ranks
    return f"{low}" if low == high else f"{low}-{high}"


def format_megabytes(size: int) -> str:
    """Format a number of bytes in MB."""
    return f"{size / 1e6:.2f} MB"
