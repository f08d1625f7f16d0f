"""Style and helpers shared by the analysis plots: colors, labels, heat maps and saving."""

# matplotlib does not annotate the keyword arguments of its methods.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.atomic_files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors and markers of adapters, in order; the marker changes when the colors are used up.
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#9d755d", "#d67195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, PALE = "#1f2430", "#d5d8de"  # text and emphasized lines; grid lines
_DPI = 140


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure with a width and height in inches."""
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG file, atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    with atomic_file(Path(path)) as part:
        figure.savefig(part, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.15)


def shorten_name(name: str, longest: int = 24) -> str:
    """Shorten an adapter's name to a number of characters, and escape dollar signs, which start a formula."""
    shortened = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return shortened.replace("$", r"\$")


def shorten_block(block: str) -> str:
    """Shorten a block's name for a label.

    `unet.down_blocks.0` becomes `down 0`, `unet.mid_block` becomes `middle`, and `text_encoder_2` becomes
    `text encoder 2`.
    """
    inner = block.removeprefix("unet.")
    return "middle" if inner == "mid_block" else inner.replace("_blocks.", " ").replace("_", " ")


def hide_spines(axes: Axes) -> None:
    """Remove the upper and right sides of the frame."""
    axes.spines[["top", "right"]].set_visible(False)


def draw_heat_map(axes: Axes, values: Any, *, colors: str, low: float, high: float) -> Any:
    """Draw a heat map without a frame.

    Args:
        axes: Where to draw.
        values: Values (rows, columns); NaN is drawn in pale gray.
        colors: The name of a matplotlib color map.
        low: The value at the lower end of the color map.
        high: The value at the upper end of the color map.

    Returns:
        The image, for a color bar and for `label_cells`.
    """
    import matplotlib

    palette = matplotlib.colormaps[colors].with_extremes(bad="#eceef1")
    image = axes.imshow(values, cmap=palette, vmin=low, vmax=high, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def label_cells(axes: Axes, image: Any, texts: Sequence[Sequence[str]]) -> None:
    """Write a text in each cell of a heat map, dark on light colors and white on dark colors.

    Args:
        axes: The axes of the heat map.
        image: The result of `draw_heat_map`.
        texts: The text of each cell; empty for none.
    """
    values = image.get_array()
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            if not text:
                continue
            red, green, blue, _ = image.cmap(image.norm(values[y, x]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else INK)
