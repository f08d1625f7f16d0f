"""What was taken out of a checkpoint, as plain values and as text."""

from dataclasses import asdict
from typing import Any

from lora_diffusion.algebra.reduce.resize import Loss
from lora_diffusion.architectures.blocks import block_prefix
from lora_diffusion.core.atomic_files import count_bytes
from lora_diffusion.core.tables import format_table
from lora_diffusion.workflows.adapters.combine import format_megabytes, format_range, loss_to_json
from lora_diffusion.workflows.adapters.extract import ExtractResult, format_groups


def to_json(done: ExtractResult) -> dict[str, Any]:
    """Return the result as plain values, ready for JSON."""
    report = done.found.report
    return {
        "from": done.tuned or done.base,
        "base": done.base,
        "to": str(done.output),
        "layers": len(done.found.layers),
        "norms_and_biases": len(done.kept),
        "equal": list(done.found.equal),
        "left_out": {kind: asdict(group) for kind, group in done.left_out.items()},
        "left_out_share": done.left_out_norm / done.whole_norm,
        "whole_error": done.whole_error,
        "bytes": count_bytes(done.output),
        **loss_to_json(report.total),
        "blocks": {block: loss_to_json(loss) for block, loss in report.by_group(block_prefix).items()},
        "by_module": {path: asdict(loss) for path, loss in report.modules.items()},
    }


def format_report(done: ExtractResult) -> str:
    """Format a table of losses by block, and what is not in the file."""
    what = "of the difference" if done.tuned else "of the base's own weights, not to be added to a base"
    head = f"{done.output}: {len(done.found.layers)} layers {what}, {format_megabytes(count_bytes(done.output))}"
    rows = [*done.found.report.by_group(block_prefix).items(), ("all", done.found.report.total)]
    table = format_table(["block", "modules", "rank", "norm", "error"], [format_row(name, loss) for name, loss in rows])
    lines = [head, table]
    if done.kept:
        lines.append(f"kept whole: {len(done.kept)} norms and biases")
    if done.found.equal:
        lines.append(f"no layer for {len(done.found.equal)} modules that are equal")
    if done.left_out:
        share = done.left_out_norm / done.whole_norm
        lines.append(f"left out: {format_groups(done.left_out)}; {share:.2%} of the norm of the whole")
    return "\n".join([*lines, f"error of the whole: {done.whole_error:.3g}"])


def format_row(name: str, loss: Loss) -> list[str]:
    """Format the cells of one row of the table."""
    return [name, str(loss.modules), format_range(loss.ranks_after), f"{loss.norm:.4g}", f"{loss.relative:.3g}"]
