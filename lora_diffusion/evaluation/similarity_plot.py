"""Plot the subspace similarity phi(i, j) of two adapters, as in the LoRA paper [arXiv:2106.09685, figure 3].

phi(i, j) is 1 if the smaller of the subspaces of the first i and the first j singular directions lies in the other, and
0 if they are orthogonal.
"""

# matplotlib does not annotate the keyword arguments of its methods.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_diffusion.evaluation.plot_style import draw_heat_map, new_figure, save_figure, shorten_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    ("input", "similarity", "input directions"),
    ("output", "similarity", "output directions"),
    ("input", "random", "random input directions"),
    ("output", "random", "random output directions"),
)


def save_similarity_plot(pair: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Plot the similarity of input and output directions, and below them that of random directions.

    Each panel shows the mean over the modules that both adapters change. All panels have the same color scale.

    Args:
        pair: One of the `pairs` in the result of `analyze_files`; its adapters must have modules in common.
        path: The PNG file to write.

    Raises:
        OutputError: If the file cannot be written.
    """
    grids = [pair[side][what] for side, what, _ in _PANELS]
    highest = max(value for grid in grids for row in grid for value in row)
    figure = new_figure(7.6, 6.8)
    panels: list[Axes] = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)
    images = [
        draw_heat_map(axes, grid, colors="viridis", low=0, high=highest)
        for axes, grid in zip(panels, grids, strict=True)
    ]
    for axes, (_, _, title), grid in zip(panels, _PANELS, grids, strict=True):
        axes.set_title(title, fontsize=11)
        _label_directions(axes, grid)
    figure.supxlabel(f"first j directions of {shorten_name(pair['second'])}", fontsize=10)
    figure.supylabel(f"first i directions of {shorten_name(pair['first'])}", fontsize=10)
    bar = figure.colorbar(images[0], ax=panels, shrink=0.7, aspect=28)
    bar.set_label("φ(i, j): 0 orthogonal, 1 one inside the other (mean over modules)")
    bar.outline.set_visible(False)
    save_figure(figure, path)


def _label_directions(axes: Axes, grid: Sequence[Sequence[float]]) -> None:
    """Number rows and columns from 1, with at most about a dozen tick labels each."""
    for count, axis in ((len(grid), axes.yaxis), (len(grid[0]), axes.xaxis)):
        step = -(-count // 12)
        numbers = sorted({1, *range(step, count + 1, step)})
        axis.set_ticks([number - 1 for number in numbers], [str(number) for number in numbers])
