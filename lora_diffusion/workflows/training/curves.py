"""How a run went, as curves."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
_MOST_POINTS = 2000
"""No curve is drawn with more; what is between is averaged."""
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#a0aec0"


def draw_curves(log: Lines) -> bytes:
    """Draw loss, validation with the best step marked, drift if measured, gradient norm and learning rate, as PNG."""
    steps = [line for line in log if "loss" in line]
    checked = [line for line in steps if "validation" in line]
    drifted = [line for line in checked if line["validation"]["drift"] is not None]
    drawings: list[tuple[Callable[[Axes, Lines], None], Lines]] = [
        (_draw_loss, steps),
        (_draw_validation, checked),
        (_draw_drift, drifted),
        (_draw_gradient, steps),
        (_draw_rate, steps),
    ]
    panels = [(draw, lines) for draw, lines in drawings if lines]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.6, 3.1 * rows), layout="constrained")
    every = figure.subplots(rows, 2).flatten()
    for axes in every[len(panels) :]:
        axes.remove()
    for axes, (draw, lines) in zip(every, panels, strict=False):
        draw(axes, lines)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _draw_loss(axes: Axes, steps: Lines) -> None:
    """Every step lightly, and a running mean over a fiftieth of the run, as single losses say little."""
    x, y = _average_points(steps, "loss")
    axes.plot(x, y, color=_GREY, linewidth=0.7, alpha=0.7)
    width = max(1, len(y) // 50)
    smooth = np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x[width - 1 :], smooth, color=_BLUE, linewidth=1.6)
    axes.set_title(f"training loss (mean of {width * max(1, len(steps) // len(y))})" if width > 1 else "training loss")


def _draw_validation(axes: Axes, checked: Lines) -> None:
    x = [line["step"] for line in checked]
    y = [line["validation"]["loss"] for line in checked]
    axes.plot(x, y, color=_ORANGE, marker="o", markersize=3, linewidth=1.4)
    best = int(np.argmin(y))
    axes.plot(x[best], y[best], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=_ORANGE)
    axes.annotate(f"best: step {x[best]}", (x[best], y[best]), xytext=(0, 12), textcoords="offset points", ha="center")
    axes.margins(y=0.25)
    axes.set_title("loss on held-out pictures")


def _draw_drift(axes: Axes, drifted: Lines) -> None:
    drifts = [100 * line["validation"]["drift"] for line in drifted]
    axes.plot([line["step"] for line in drifted], drifts, color=_BLUE, marker="o", markersize=3, linewidth=1.4)
    axes.set_title("drift on other prompts, % of the prediction's energy")
    axes.set_ylim(bottom=0)


def _draw_gradient(axes: Axes, steps: Lines) -> None:
    axes.plot(*_average_points(steps, "gradient_norm"), color=_GREY, linewidth=0.9)
    axes.set_title("gradient norm, before clipping")


def _draw_rate(axes: Axes, steps: Lines) -> None:
    axes.plot(*_average_points(steps, "rate"), color=_BLUE, linewidth=1.4)
    axes.set_title("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _average_points(steps: Lines, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values, averaged over equal ranges if there are too many."""
    x, y = (np.array([line[name] for line in steps], dtype=float) for name in ("step", key))
    each = -(-len(x) // _MOST_POINTS)
    whole = len(x) // each * each
    return x[:whole].reshape(-1, each).mean(1), y[:whole].reshape(-1, each).mean(1)
