"""How the plots of analyses look: colors, names that can be read, and a figure as a whole PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.atomic_files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#9d755d", "#d67195")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, PALE = "#1f2430", "#d5d8de"
DPI = 140


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure  # slow to import, and only plots need it

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write as PNG, whole or not at all. Raises OutputError."""
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)


def shorten_name(name: str, longest: int = 24) -> str:
    """A user's name, cut to a length; a dollar sign is one, and opens no formula."""
    cut = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return cut.replace("$", r"\$")


def shorten_block(block: str) -> str:
    """`unet.down_blocks.0` as `down 0`, `unet.mid_block` as `middle`, `text_encoder_2` as `text encoder 2`."""
    inner = block.removeprefix("unet.")
    return "middle" if inner == "mid_block" else inner.replace("_blocks.", " ").replace("_", " ")


def hide_spines(axes: Axes) -> None:
    """Take the frame's upper and right sides away."""
    axes.spines[["top", "right"]].set_visible(False)


def draw_heat_map(axes: Axes, values: Any, *, colors: str, low: float, high: float) -> Any:
    """Cells of (rows, columns) without a frame; NaN is pale."""
    import matplotlib

    palette = matplotlib.colormaps[colors].with_extremes(bad="#eceef1")
    image = axes.imshow(values, cmap=palette, vmin=low, vmax=high, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def label_cells(axes: Axes, image: Any, texts: Sequence[Sequence[str]]) -> None:
    """One text in each cell, in ink on pale colors and white on dark ones."""
    values = image.get_array()
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            if not text:
                continue
            red, green, blue, _ = image.cmap(image.norm(values[y, x]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else INK)
