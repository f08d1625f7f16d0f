"""Exponential moving average (EMA) of the trained parameters, as an immutable value."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """Bias-corrected EMA of the parameters p_1..p_n after each of n steps.

    The weight of p_i is decay^(n - i), divided by the sum of all weights, like the bias correction of Adam
    [arXiv:1412.6980, section 3]. The initial values, which are random, therefore have no weight, and the average is
    also correct for short runs.
    """

    decay: float
    """Factor by which the weight of a step falls with each later step, in [0, 1)."""
    steps: int = 0
    """Number of steps that the average contains."""
    means: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    """Averages by parameter name; empty before the first step."""

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> "MovingAverage":
        """Return the average with one more step.

        Args:
            parameters: Parameters after the step, with the same names in every step.

        Raises:
            KeyError: A parameter was not in the previous steps.
        """
        share = (1 - self.decay) / (1 - self.decay ** (self.steps + 1))
        if self.steps == 0:
            means = {name: p.detach().clone() for name, p in parameters.items()}
        else:
            means = {
                name: torch.lerp(self.means[name].to(p.device), p.detach(), share) for name, p in parameters.items()
            }
        return replace(self, steps=self.steps + 1, means=means)

    def state_dict(self) -> dict[str, Any]:
        """Return all fields; `MovingAverage(**state)` restores the average."""
        return {"decay": self.decay, "steps": self.steps, "means": dict(self.means)}


@contextmanager
def swapped_parameters(parameters: Mapping[str, Tensor], average: MovingAverage) -> Generator[None]:
    """Replace the parameters by their averages inside the context, and restore them bit for bit afterwards.

    Before the first step there is no average, and the parameters stay as they are.

    Raises:
        KeyError: A parameter has no average; no parameter has been changed.
    """
    if average.steps == 0:
        yield
        return
    original = {name: p.detach().clone() for name, p in parameters.items()}
    copy_values(parameters, average.means)
    try:
        yield
    finally:
        copy_values(parameters, original)


@torch.no_grad()
def copy_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of the same names.

    Raises:
        KeyError: A parameter has no value; no parameter has been changed.
    """
    for p, value in [(p, values[name]) for name, p in parameters.items()]:
        p.copy_(value)
