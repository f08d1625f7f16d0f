"""The result of an extraction as plain values and as text."""

from dataclasses import asdict
from typing import Any

from lora_diffusion.algebra.reduce.resize import Loss
from lora_diffusion.architectures.blocks import block_prefix
from lora_diffusion.core.atomic_files import count_bytes
from lora_diffusion.core.tables import format_table
from lora_diffusion.workflows.adapters.combine import format_megabytes, format_range, loss_to_json
from lora_diffusion.workflows.adapters.extract import ExtractResult, format_groups


def to_json(result: ExtractResult) -> dict[str, Any]:
    """Return the result of an extraction as plain values, ready for JSON."""
    report = result.extraction.report
    return {
        "from": result.tuned or result.base,
        "base": result.base,
        "to": str(result.output),
        "layers": len(result.extraction.layers),
        "norms_and_biases": len(result.kept),
        "equal": list(result.extraction.equal),
        "left_out": {kind: asdict(group) for kind, group in result.left_out.items()},
        "left_out_share": result.left_out_norm / result.whole_norm,
        "whole_error": result.whole_error,
        "bytes": count_bytes(result.output),
        **loss_to_json(report.total),
        "blocks": {block: loss_to_json(loss) for block, loss in report.by_group(block_prefix).items()},
        "by_module": {path: asdict(loss) for path, loss in report.modules.items()},
    }


def format_report(result: ExtractResult) -> str:
    """Format a table of errors by block, and what was left out."""
    what = "of the difference" if result.tuned else "of the base's own weights, not to be added to a base"
    size = format_megabytes(count_bytes(result.output))
    head = f"{result.output}: {len(result.extraction.layers)} layers {what}, {size}"
    rows = [*result.extraction.report.by_group(block_prefix).items(), ("all", result.extraction.report.total)]
    cells = [_format_row(name, loss) for name, loss in rows]
    lines = [head, format_table(["block", "modules", "rank", "norm", "error"], cells)]
    if result.kept:
        lines.append(f"kept in full: {len(result.kept)} norms and biases")
    if result.extraction.equal:
        lines.append(f"no layer for {len(result.extraction.equal)} modules that are equal in both")
    if result.left_out:
        share = result.left_out_norm / result.whole_norm
        lines.append(f"left out: {format_groups(result.left_out)}; {share:.2%} of the norm of all differences")
    return "\n".join([*lines, f"error over all differences: {result.whole_error:.3g}"])


def _format_row(name: str, loss: Loss) -> list[str]:
    return [name, str(loss.modules), format_range(loss.ranks_after), f"{loss.norm:.4g}", f"{loss.relative:.3g}"]
