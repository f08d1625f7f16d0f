"""Plot the singular values of each block; the steeper they fall, the lower is the rank that an adapter needs."""

# matplotlib does not annotate the keyword arguments of its methods.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from lora_diffusion.evaluation.plot_style import (
    INK,
    PALE,
    hide_spines,
    new_figure,
    save_figure,
    shorten_block,
    shorten_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_COLUMNS = 3


def save_spectrum_plot(adapters: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot a panel for each adapter, with a line for each block: the median spectrum of its modules on a log scale.

    Args:
        adapters: The `adapters` in the result of `analyze_files`.
        path: The PNG file to write.

    Raises:
        OutputError: If the file cannot be written.
    """
    columns = min(len(adapters), _MAX_COLUMNS)
    rows = ceil(len(adapters) / columns)
    figure = new_figure(3.4 * columns + 1.9, 3.1 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    flat: list[Axes] = list(panels.flat)
    colors = _block_colors(sorted({block for adapter in adapters for block in adapter["blocks"]}))
    for axes, adapter in zip(flat, adapters, strict=False):
        _draw_spectra(axes, adapter, colors)
    for axes in flat[len(adapters) :]:
        axes.set_visible(False)
    for axes in flat[max(len(adapters) - columns, 0) : len(adapters)]:
        axes.tick_params(labelbottom=True)
    handles = {line.get_label(): line for axes in flat for line in axes.get_lines()}
    shown = [block for block in colors if shorten_block(block) in handles]
    labels = [shorten_block(block) for block in shown]
    figure.legend([handles[label] for label in labels], labels, loc="outside right upper", frameon=False, title="block")
    figure.supxlabel("direction, strongest first", fontsize=10)
    figure.supylabel("singular value of the delta (median over modules)", fontsize=10)
    save_figure(figure, path)


def _block_colors(blocks: Sequence[str]) -> dict[str, Any]:
    """Choose a color for each block: viridis along the UNet, and dark gray for the text encoders."""
    import matplotlib

    palette = matplotlib.colormaps["viridis"]
    unet_blocks = [block for block in blocks if block.startswith("unet.")]
    positions = {block: 0.92 * i / max(len(unet_blocks) - 1, 1) for i, block in enumerate(unet_blocks)}
    return {block: palette(positions[block]) if block in positions else INK for block in blocks}


def _draw_spectra(axes: Axes, adapter: Mapping[str, Any], colors: Mapping[str, Any]) -> None:
    """Draw the spectra of one adapter."""
    from matplotlib.ticker import MaxNLocator

    for block, statistics in adapter["blocks"].items():
        values = [value for value in statistics["values"] if value > 0]
        style = "-" if block.startswith("unet.") else "--"
        marker = "o" if len(values) <= 16 else ""
        numbers = range(1, len(values) + 1)
        axes.plot(numbers, values, style, marker=marker, ms=3, lw=1.4, color=colors[block], label=shorten_block(block))
    axes.set_yscale("log")
    axes.set_xlim(left=0.5)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(shorten_name(adapter["name"]), fontsize=11)
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    hide_spines(axes)
