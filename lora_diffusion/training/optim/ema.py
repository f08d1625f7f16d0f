"""A running mean of the trained parameters, as a value."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """Mean of the parameters p_1..p_n after each of n steps, in which p_i weighs decay^(n - i).

    The weights are divided by their sum, as Adam divides its moments [arXiv 1412.6980, section 3], so that the initial
    values, which are random, never take part and a short run has a mean of its own.
    """

    decay: float
    steps: int = 0
    means: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> "MovingAverage":
        """The mean with one more step in it, of the same names at every step. Raises KeyError for a new one."""
        share = (1 - self.decay) / (1 - self.decay ** (self.steps + 1))
        if self.steps == 0:
            means = {name: p.detach().clone() for name, p in parameters.items()}
        else:
            means = {
                name: torch.lerp(self.means[name].to(p.device), p.detach(), share) for name, p in parameters.items()
            }
        return replace(self, steps=self.steps + 1, means=means)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for `MovingAverage(**state)`."""
        return {"decay": self.decay, "steps": self.steps, "means": dict(self.means)}


@contextmanager
def swapped_parameters(parameters: Mapping[str, Tensor], average: MovingAverage) -> Iterator[None]:
    """The means in place of the parameters; afterwards the parameters' own values are back, bit for bit.

    Before the first step there is no mean, and the parameters stay as they are. Raises KeyError if a parameter has no
    mean, before anything is touched.
    """
    if average.steps == 0:
        yield
        return
    own = {name: p.detach().clone() for name, p in parameters.items()}
    copy_values(parameters, average.means)
    try:
        yield
    finally:
        copy_values(parameters, own)


@torch.no_grad()
def copy_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names. Raises KeyError if one is missing, before anything is touched."""
    for p, value in [(p, values[name]) for name, p in parameters.items()]:
        p.copy_(value)
