"""Ranks of an adapter by block, for methods such as AdaLoRA that distribute ranks over the modules."""

# pyright: reportUnknownMemberType=false
# matplotlib leaves keyword arguments untyped

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.architectures.blocks import block_prefix

_BLUE, _GREY = "#2b6cb0", "#a0aec0"


def ranks_by_block(adapter: Adapter) -> dict[str, list[int]]:
    """Return the ranks of the modules in each block; empty if all modules have the same rank."""
    blocks: dict[str, list[int]] = {}
    for path, layer in adapter.layers.items():
        if isinstance(layer, LoRALayer):
            blocks.setdefault(block_prefix(path), []).append(layer.rank)
    distinct = {rank for ranks in blocks.values() for rank in ranks}
    return blocks if len(distinct) > 1 else {}


def draw_allocation(ranks: Mapping[str, Sequence[int]]) -> bytes:
    """Draw the mean rank of each block as a bar, and the rank of each module as a mark.

    Returns:
        The drawing as the bytes of a PNG file.
    """
    blocks = sorted(ranks)
    figure = Figure(figsize=(9.6, 0.32 * len(blocks) + 1), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(blocks)), [sum(ranks[b]) / len(ranks[b]) for b in blocks], color=_BLUE, height=0.6, alpha=0.75)
    for row, block in enumerate(blocks):
        axes.plot(ranks[block], [row] * len(ranks[block]), "|", color=_GREY, markersize=9)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set_xlabel("rank: mean of the block (bar) and of each module (mark)")
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
