"""Plot the effective rank of each block for several adapters."""

# matplotlib does not annotate the keyword arguments of its methods.
# pyright: reportUnknownMemberType=false

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lora_diffusion.evaluation.plot_style import (
    COLORS,
    MARKERS,
    PALE,
    hide_spines,
    new_figure,
    save_figure,
    shorten_block,
    shorten_name,
)


def save_rank_plot(adapters: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot a row for each block, with a mark for each adapter's effective rank (median over the block's modules).

    Args:
        adapters: The `adapters` in the result of `analyze_files`.
        path: The PNG file to write.

    Raises:
        OutputError: If the file cannot be written.
    """
    blocks = sorted({block for adapter in adapters for block in adapter["blocks"]})
    height = 0.3 + 0.045 * len(adapters)
    figure = new_figure(8, height * len(blocks) + 1.2)
    axes = figure.add_subplot()
    step = 0.6 / len(adapters)
    for i, adapter in enumerate(adapters):
        ranks = {block: statistics["effective_rank"] for block, statistics in adapter["blocks"].items()}
        rows = [y + step * (i - (len(adapters) - 1) / 2) for y, block in enumerate(blocks) if block in ranks]
        values = [ranks[block] for block in blocks if block in ranks]
        color, marker = COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]
        label = f"{shorten_name(adapter['name'])} (rank {adapter['whole']['rank']:g})"
        axes.plot(values, rows, marker, color=color, ms=6, label=label)
    axes.set_yticks(range(len(blocks)), [shorten_block(block) for block in blocks])
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.set_xlim(
        0, 1.02 * max(statistics["rank"] for adapter in adapters for statistics in adapter["blocks"].values())
    )
    axes.hlines([y + 0.5 for y in range(len(blocks) - 1)], 0, 1, PALE, lw=0.6, transform=axes.get_yaxis_transform())
    axes.grid(axis="x", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("effective rank of the delta (median over modules)")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", frameon=False)
    hide_spines(axes)
    save_figure(figure, path)
