"""Plot how strongly an adapter changes each block."""

# matplotlib does not annotate the keyword arguments of its methods.
# pyright: reportUnknownMemberType=false

import os
from collections.abc import Mapping

from lora_diffusion.evaluation.plot_style import COLORS, INK, hide_spines, new_figure, save_figure


def save_norm_plot(norms: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str], *, title: str) -> None:
    """Plot the Frobenius norms of an adapter's deltas: a bar for each block's median, and a mark for its maximum.

    Args:
        norms: For each block, the `median` and the `max` of the norms of its modules.
        path: The PNG file to write.
        title: The title of the plot.

    Raises:
        OutputError: If the file cannot be written.
    """
    names = list(norms)
    figure = new_figure(8, 0.32 * len(names) + 1.4)
    axes = figure.add_subplot()
    axes.barh(names, [norms[name]["median"] for name in names], color=COLORS[0], label="median")
    axes.plot([norms[name]["max"] for name in names], names, "|", color=INK, markersize=12, label="largest")
    axes.invert_yaxis()
    axes.set_xlabel("Frobenius norm of the delta")
    axes.set_title(title)
    axes.legend(frameon=False)
    hide_spines(axes)
    save_figure(figure, path)
