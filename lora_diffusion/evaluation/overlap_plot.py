"""Plots of how much adapters will fight: each with each, and each two by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
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

NOTHING = float("nan")
SHARED = "energy in the other's directions, %"
MOST_PAIRS = 12
FULL_COSINE, FULL_SHARE = 0.25, 25.0
"""Where colors are at their darkest, or further out: small overlap must not look like much."""


def save_overlap_plot(facts: Mapping[str, Any], path: Path) -> None:
    """Two matrices over all adapters, cosine of the deltas and shared energy, with numbers. Raises OutputError."""
    names = facts["names"]
    side = max(0.75 * len(names), 2.2)
    figure = new_figure(2 * side + 4.6, side + 1.6)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    cosines, shares = clear_diagonal(facts["cosine"], 1), clear_diagonal(facts["shared"], 100)
    reach = max(largest_magnitude(cosines), FULL_COSINE)
    image = draw_heat_map(left, cosines, colors="RdBu_r", low=-reach, high=reach)
    label_cells(left, image, format_cells(cosines, 3))
    finish_matrix(figure, left, image, names, "cosine of the deltas", "−1 opposite, 0 unrelated, 1 the same")
    chance = 100 * fmean(pair["chance"] for pair in facts["pairs"])
    image = draw_heat_map(right, shares, colors="Blues", low=0, high=max(largest_magnitude(shares), FULL_SHARE))
    label_cells(right, image, format_cells(shares, 1))
    finish_matrix(figure, right, image, names, f"shared energy (random: {chance:.1f} %)", SHARED)
    save_figure(figure, path)


def clear_diagonal(matrix: Sequence[Sequence[float]], factor: float) -> list[list[float]]:
    """The matrix times a factor, without what an adapter has in common with itself."""
    return [[NOTHING if x == y else factor * value for x, value in enumerate(row)] for y, row in enumerate(matrix)]


def largest_magnitude(values: Sequence[Sequence[float]]) -> float:
    return max((abs(value) for row in values for value in row if value == value), default=0.0)


def format_cells(values: Sequence[Sequence[float]], decimals: int) -> list[list[str]]:
    return [["" if value != value else f"{value:z.{decimals}f}" for value in row] for row in values]


def finish_matrix(figure: Figure, axes: Axes, image: Any, names: Sequence[str], title: str, unit: str) -> None:
    labels = [shorten_name(name, 16) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.set_title(title, fontsize=11)
    add_bar(figure, axes, image, unit)


def add_bar(figure: Figure, axes: Axes, image: Any, unit: str) -> None:
    bar = figure.colorbar(image, ax=axes, aspect=24, pad=0.03)
    bar.set_label(unit, labelpad=8)
    bar.outline.set_visible(False)


def save_block_overlap_plot(pairs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Shared energy by block, a column for each two adapters, the twelve that share most. Raises OutputError."""
    chosen = sorted(pairs, key=lambda pair: -pair["shared"])[:MOST_PAIRS]
    blocks = sorted({block for pair in chosen for block in pair["blocks"]})
    shares = [
        [100 * pair["blocks"][b]["shared"] if b in pair["blocks"] else NOTHING for pair in chosen] for b in blocks
    ]
    figure = new_figure(0.85 * len(chosen) + 3.6, 0.42 * len(blocks) + 2.2)
    axes = figure.add_subplot()
    image = draw_heat_map(axes, shares, colors="Blues", low=0, high=max(largest_magnitude(shares), FULL_SHARE))
    label_cells(axes, image, format_cells(shares, 1))
    labels = [f"{shorten_name(pair['first'], 16)} + {shorten_name(pair['second'], 16)}" for pair in chosen]
    axes.set_xticks(range(len(chosen)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(blocks)), [shorten_block(block) for block in blocks])
    axes.set_title("shared energy by block", fontsize=11)
    add_bar(figure, axes, image, SHARED)
    save_figure(figure, path)
