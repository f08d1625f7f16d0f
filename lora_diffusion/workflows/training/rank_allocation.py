"""Where a method that hands ranks out has put them, block by block."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.architectures.blocks import block_prefix

_BLUE, _GREY = "#2b6cb0", "#a0aec0"


def ranks_by_block(adapter: Adapter) -> dict[str, list[int]]:
    """Return the ranks of each block's modules; empty if all modules have one rank."""
    found: dict[str, list[int]] = {}
    for path, layer in adapter.layers.items():
        if isinstance(layer, LoRALayer):
            found.setdefault(block_prefix(path), []).append(layer.rank)
    every = {rank for ranks in found.values() for rank in ranks}
    return found if len(every) > 1 else {}


def draw_allocation(ranks: Mapping[str, Sequence[int]]) -> bytes:
    """Draw the mean rank of each block as a bar, and a mark for every module, as PNG."""
    blocks = sorted(ranks)
    figure = Figure(figsize=(9.6, 0.32 * len(blocks) + 1), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(blocks)), [sum(ranks[b]) / len(ranks[b]) for b in blocks], color=_BLUE, height=0.6, alpha=0.75)
    for row, block in enumerate(blocks):
        axes.plot(ranks[block], [row] * len(ranks[block]), "|", color=_GREY, markersize=9)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set_xlabel("rank: mean of the block, and each module")
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
