"""Adapter files made into one, exactly or at a small rank; one file alone is resized."""

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
from lora_diffusion.algebra.metrics.quantization_error import rounding_error
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

STALE = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
"""What kohya's record says of factors that are no longer those of the file."""


@dataclass(frozen=True, kw_only=True)
class CombineResult:
    """A written file, and the files it was made from."""

    sources: tuple[Path, ...]
    output: Path
    how: CombineConfig
    adapter: Adapter
    report: CompressionReport | None
    """What compression took; None for an exact sum."""
    rounding_error: float
    """Norm of what rounding to the written type changed in the deltas over the norm of all deltas."""
    bytes_before: int
    bytes_after: int


def combine_files(entries: Sequence[BlendEntry], output: Path, how: CombineConfig) -> CombineResult:
    """Combine adapters in any dialect into a native file; a single adapter may be resized.

    Raises OutputError if the output is an input, or there already, ConfigError if there is nothing to combine, or what
    cannot be combined, or a type that cannot hold it, FamilyMismatchError, AdapterFormatError.
    """
    sources = tuple(dict.fromkeys(Path(entry.path) for entry in entries))
    check_output(output, sources, force=how.force)
    blend = load_blend(entries, ignore=how.ignore_unmatched).blend
    active = [entry for entry in blend.entries if not is_zero(entry.weight)]
    if not active:
        raise ConfigError("nothing to combine; give at least one adapter with a weight other than 0")
    exact, report = combine_blend(materialize_dora(blend, how.base) if how.base else blend, how)
    dtype = find_common_dtype(active) if how.dtype == "keep" else torch_dtype(how.dtype)
    rounded = replace(cast_adapter(exact, dtype), tokens=exact.tokens)
    if rounded.non_finite:
        raise ConfigError(
            f"{rounded.non_finite[0]} is beyond the range of {dtype_name(dtype)}; lower the weights, or choose "
            "bfloat16 or float32"
        )
    error = rounding_error(exact, rounded)
    metadata = merge_metadata(active, output.stem).model_copy(
        update={"training": make_record(active, how, report, error)}
    )
    written = replace(rounded, metadata=metadata)
    save_adapter(written, output)
    return CombineResult(
        sources=sources,
        output=output,
        how=how,
        adapter=written,
        report=report,
        rounding_error=error,
        bytes_before=sum(map(count_bytes, sources)),
        bytes_after=count_bytes(output),
    )


def combine_blend(blend: Blend, how: CombineConfig) -> tuple[Adapter, CompressionReport | None]:
    """Combine a blend into one adapter; every way of combining is implemented here.

    Raises LoRADiffusionError's children.
    """
    family = next((e.adapter.metadata.family for e in blend.active if e.adapter.metadata.family), "")
    layout = LAYOUTS.get(family)
    if how.consensus:
        blend = Blend(
            entries=(WeightedAdapter(adapter=combine_by_consensus(blend, how.consensus, AdapterMetadata(), layout)),)
        )
    if how.first is not None:
        return truncate_adapter(combine(disable_timestep_ranks(blend), AdapterMetadata(), layout), how.first)
    if how.rule is None:
        return combine(blend, AdapterMetadata(), layout), None
    adapter, report = compress(joint_sum(blend, layout), how.rule, AdapterMetadata())
    return replace(adapter, tokens=merge_tokens(blend)), report


def materialize_dora(blend: Blend, base: str) -> Blend:
    """Replace each DoRA layer by its change to the base's weight, as a full difference.

    That is how a blend applies it: beside the others, never on top of them. Raises BaseModelError, FamilyMismatchError.
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


def find_common_dtype(entries: Sequence[WeightedAdapter]) -> torch.dtype:
    """Return the common half-precision type of all layers and biases, else float32."""
    adapters = [entry.adapter for entry in entries]
    kinds = {
        factor.dtype for adapter in adapters for layer in adapter.layers.values() for factor in layer.factors.values()
    }
    kinds |= {bias.dtype for adapter in adapters for bias in adapter.biases.values()}
    return kinds.pop() if kinds in ({torch.float16}, {torch.bfloat16}) else torch.float32


def merge_metadata(entries: Sequence[WeightedAdapter], name: str) -> AdapterMetadata:
    """Merge the metadata of all adapters; differing values are left empty, and trigger words are united."""
    known = [entry.adapter.metadata for entry in entries]

    def common_value(field: str) -> str:
        values = {getattr(metadata, field) for metadata in known} - {""}
        return values.pop() if len(values) == 1 else ""

    variants = sorted({metadata.variant or "none" for metadata in known})
    odd = (f"made of adapters for bases of different variants ({', '.join(variants)})",) if len(variants) > 1 else ()
    return AdapterMetadata(
        name=name,
        family=common_value("family"),
        base_name=common_value("base_name"),
        base_hash=common_value("base_hash"),
        description=common_value("description"),
        variant=known[0].variant if len(variants) == 1 else "",
        trigger_words=tuple(dict.fromkeys(word for metadata in known for word in metadata.trigger_words)),
        created=known[0].created if len(known) == 1 else "",
        notes=tuple(dict.fromkeys((*(note for metadata in known for note in metadata.notes), *odd))),
        merged_from=tuple(f"{entry.name} ({entry.hash[:16]})" for entry in entries),
    )


def disable_timestep_ranks(blend: Blend) -> Blend:
    """Return the blend with every direction of a T-LoRA active at all steps."""

    def disable(adapter: Adapter) -> Adapter:
        return replace(adapter, metadata=adapter.metadata.model_copy(update={"min_rank": 0}))

    return Blend(entries=tuple(replace(entry, adapter=disable(entry.adapter)) for entry in blend.entries))


def make_record(
    entries: Sequence[WeightedAdapter], how: CombineConfig, report: CompressionReport | None, rounding: float
) -> dict[str, Any]:
    """Return the record of how the file was made; a single adapter keeps the record of its training."""
    training = dict(entries[0].adapter.metadata.training) if len(entries) == 1 else {}
    parts = [
        {"file": Path(part.path).name, **part.model_dump(mode="json", include={"name", "hash", "weight"})}
        for part in blend_entries(Blend(entries=tuple(entries)))
    ]
    made = {
        "adapters": parts,
        "rule": describe_rule(how),
        "consensus": how.consensus.model_dump() if how.consensus else None,
        "relative_error": 0.0 if report is None else report.total.relative,
        "rounding_error": rounding,
        "base": how.base,
    }
    return {key: value for key, value in training.items() if key not in STALE} | {"combination": made}


def describe_rule(how: CombineConfig) -> str:
    """Describe how ranks were chosen, for a record."""
    if how.first is not None:
        return f"first {how.first}"
    return "exact" if how.rule is None else str(how.rule)


def to_json(done: CombineResult) -> dict[str, Any]:
    """Return the result as plain values, ready for JSON."""
    facts = {
        "from": [str(source) for source in done.sources],
        "to": str(done.output),
        "layers": len(done.adapter.layers),
        "rounding_error": done.rounding_error,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "exact": done.report is None and done.how.consensus is None,
    }
    if done.report is None:
        return facts
    blocks = {block: loss_to_json(loss) for block, loss in done.report.by_group(block_prefix).items()}
    modules = {path: asdict(loss) for path, loss in done.report.modules.items()}
    return {**facts, **loss_to_json(done.report.total), "blocks": blocks, "by_module": modules}


def loss_to_json(loss: Loss) -> dict[str, Any]:
    return {**asdict(loss), "error": loss.relative}


def format_report(done: CombineResult) -> str:
    """Format the result as text, with a table of compression losses by block."""
    before, after = format_megabytes(done.bytes_before), format_megabytes(done.bytes_after)
    sizes = f"{len(done.adapter.layers)} layers, {before} before, {after} after"
    rounding = f"rounding changed the delta by {done.rounding_error:.2%}"
    if done.report is None:
        made = f"made by {done.how.consensus.method}" if done.how.consensus else "the sum is exact"
        return f"{done.output}: {sizes}; {made}, {rounding}"
    rows = [*done.report.by_group(block_prefix).items(), ("all", done.report.total)]
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
    table = format_table(["block", "modules", "rank before", "rank after", "norm", "error"], cells)
    return f"{done.output}: {sizes}; {rounding}\n{table}"


def format_range(ranks: tuple[int, int]) -> str:
    low, high = ranks
    return f"{low}" if low == high else f"{low}-{high}"


def format_megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
