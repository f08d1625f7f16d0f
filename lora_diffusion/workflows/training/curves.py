"""Curves of a training run: losses, drift, gradient norm and learning rate by step."""

# pyright: reportUnknownMemberType=false
# matplotlib leaves keyword arguments untyped

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

LogLines = Sequence[Mapping[str, Any]]
"""Lines of a training log, parsed from JSON."""
_MAX_POINTS = 2000
"""Maximum number of points of a curve; longer runs are averaged."""
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#a0aec0"


def draw_curves(log: LogLines) -> bytes:
    """Draw training loss, validation loss, drift, gradient norm and learning rate, each in a panel of its own.

    Panels without measurements are left out.

    Returns:
        The drawing as the bytes of a PNG file.
    """
    steps = [line for line in log if "loss" in line]
    validations = [line for line in steps if "validation" in line]
    drifts = [line for line in validations if line["validation"]["drift"] is not None]
    drawings: list[tuple[Callable[[Axes, LogLines], None], LogLines]] = [
        (_draw_loss, steps),
        (_draw_validation, validations),
        (_draw_drift, drifts),
        (_draw_gradient, steps),
        (_draw_rate, steps),
    ]
    panels = [(draw, lines) for draw, lines in drawings if lines]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.6, 3.1 * rows), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(rows, 2).flatten())
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, (draw, lines) in zip(all_axes, panels, strict=False):
        draw(axes, lines)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _draw_loss(axes: Axes, steps: LogLines) -> None:
    """Draw the loss of every step and a running mean over a fiftieth of the run, since single losses are noisy."""
    x, y = _average_points(steps, "loss")
    axes.plot(x, y, color=_GREY, linewidth=0.7, alpha=0.7)
    width = max(1, len(y) // 50)
    smooth = np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x[width - 1 :], smooth, color=_BLUE, linewidth=1.6)
    axes.set_title(f"training loss (mean of {width * max(1, len(steps) // len(y))})" if width > 1 else "training loss")


def _draw_validation(axes: Axes, validations: LogLines) -> None:
    """Draw the validation loss, with a mark at its lowest value."""
    x = [line["step"] for line in validations]
    y = [line["validation"]["loss"] for line in validations]
    axes.plot(x, y, color=_ORANGE, marker="o", markersize=3, linewidth=1.4)
    best = int(np.argmin(y))
    axes.plot(x[best], y[best], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=_ORANGE)
    axes.annotate(f"best: step {x[best]}", (x[best], y[best]), xytext=(0, 12), textcoords="offset points", ha="center")
    axes.margins(y=0.25)
    axes.set_title("validation loss")


def _draw_drift(axes: Axes, validations: LogLines) -> None:
    """Draw how far predictions for prompts that were not trained moved from those of the base."""
    drifts = [100 * line["validation"]["drift"] for line in validations]
    axes.plot([line["step"] for line in validations], drifts, color=_BLUE, marker="o", markersize=3, linewidth=1.4)
    axes.set_title("change of predictions for other prompts, % of their energy")
    axes.set_ylim(bottom=0)


def _draw_gradient(axes: Axes, steps: LogLines) -> None:
    axes.plot(*_average_points(steps, "gradient_norm"), color=_GREY, linewidth=0.9)
    axes.set_title("gradient norm, before clipping")


def _draw_rate(axes: Axes, steps: LogLines) -> None:
    axes.plot(*_average_points(steps, "rate"), color=_BLUE, linewidth=1.4)
    axes.set_title("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _average_points(steps: LogLines, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and values, averaged over equal ranges if there are more than `_MAX_POINTS`."""
    x, y = (np.array([line[name] for line in steps], dtype=float) for name in ("step", key))
    width = -(-len(x) // _MAX_POINTS)
    length = len(x) // width * width
    return x[:length].reshape(-1, width).mean(1), y[:length].reshape(-1, width).mean(1)
