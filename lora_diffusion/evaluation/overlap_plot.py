"""Plot how much adapters overlap: the cosine of their deltas and their shared energy, overall and by block.

The shared energy of two adapters is the share of a delta's squared Frobenius norm that lies in the other's singular
directions, averaged over both adapters.
"""

# matplotlib does not annotate the keyword arguments of its methods.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_diffusion.evaluation.plot_style import (
    draw_heat_map,
    label_cells,
    new_figure,
    save_figure,
    shorten_block,
    shorten_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MISSING = float("nan")
_SHARED_LABEL = "energy in the other's directions, %"
_MAX_PAIRS = 12
_MIN_COSINE_RANGE, _MIN_SHARE_RANGE = 0.25, 25.0
"""The color scales reach at least this far, so that a small overlap is not drawn in a dark color."""


def save_overlap_plot(analysis: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Plot two matrices over all pairs of adapters: the cosine of the deltas, and the shared energy in percent.

    Args:
        analysis: The result of `analyze_files`.
        path: The PNG file to write.

    Raises:
        OutputError: If the file cannot be written.
    """
    names = analysis["names"]
    side = max(0.75 * len(names), 2.2)
    figure = new_figure(2 * side + 4.6, side + 1.6)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    cosines, shares = (
        _scale_and_clear_diagonal(analysis["cosine"], 1),
        _scale_and_clear_diagonal(analysis["shared"], 100),
    )
    limit = max(_largest_magnitude(cosines), _MIN_COSINE_RANGE)
    image = draw_heat_map(left, cosines, colors="RdBu_r", low=-limit, high=limit)
    label_cells(left, image, _format_cells(cosines, 3))
    _finish_matrix(figure, left, image, names, "cosine of the deltas", "−1 opposite, 0 unrelated, 1 the same")
    chance = 100 * fmean(pair["chance"] for pair in analysis["pairs"])
    image = draw_heat_map(right, shares, colors="Blues", low=0, high=max(_largest_magnitude(shares), _MIN_SHARE_RANGE))
    label_cells(right, image, _format_cells(shares, 1))
    _finish_matrix(figure, right, image, names, f"shared energy (random: {chance:.1f} %)", _SHARED_LABEL)
    save_figure(figure, path)


def _scale_and_clear_diagonal(matrix: Sequence[Sequence[float]], factor: float) -> list[list[float]]:
    """Multiply a matrix by a factor, and replace its diagonal by NaN."""
    return [[_MISSING if x == y else factor * value for x, value in enumerate(row)] for y, row in enumerate(matrix)]


def _largest_magnitude(values: Sequence[Sequence[float]]) -> float:
    """Return the largest absolute value that is not NaN, or 0."""
    return max((abs(value) for row in values for value in row if value == value), default=0.0)


def _format_cells(values: Sequence[Sequence[float]], decimals: int) -> list[list[str]]:
    """Format values with a number of decimals; NaN becomes the empty text."""
    return [["" if value != value else f"{value:z.{decimals}f}" for value in row] for row in values]


def _finish_matrix(figure: Figure, axes: Axes, image: Any, names: Sequence[str], title: str, unit: str) -> None:
    """Add the adapters' names, a title and a color bar to a matrix."""
    labels = [shorten_name(name, 16) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.set_title(title, fontsize=11)
    _add_color_bar(figure, axes, image, unit)


def _add_color_bar(figure: Figure, axes: Axes, image: Any, unit: str) -> None:
    """Add a color bar without a frame."""
    bar = figure.colorbar(image, ax=axes, aspect=24, pad=0.03)
    bar.set_label(unit, labelpad=8)
    bar.outline.set_visible(False)


def save_block_overlap_plot(pairs: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot the shared energy of each block, with a column for each of the twelve pairs that overlap most.

    Args:
        pairs: The `pairs` in the result of `analyze_files`.
        path: The PNG file to write.

    Raises:
        OutputError: If the file cannot be written.
    """
    chosen = sorted(pairs, key=lambda pair: -pair["shared"])[:_MAX_PAIRS]
    blocks = sorted({block for pair in chosen for block in pair["blocks"]})
    shares = [
        [100 * pair["blocks"][b]["shared"] if b in pair["blocks"] else _MISSING for pair in chosen] for b in blocks
    ]
    figure = new_figure(0.85 * len(chosen) + 3.6, 0.42 * len(blocks) + 2.2)
    axes = figure.add_subplot()
    image = draw_heat_map(axes, shares, colors="Blues", low=0, high=max(_largest_magnitude(shares), _MIN_SHARE_RANGE))
    label_cells(axes, image, _format_cells(shares, 1))
    labels = [f"{shorten_name(pair['first'], 16)} + {shorten_name(pair['second'], 16)}" for pair in chosen]
    axes.set_xticks(range(len(chosen)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(blocks)), [shorten_block(block) for block in blocks])
    axes.set_title("shared energy by block", fontsize=11)
    _add_color_bar(figure, axes, image, _SHARED_LABEL)
    save_figure(figure, path)
