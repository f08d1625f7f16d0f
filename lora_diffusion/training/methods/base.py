"""What every trainable update has: where it sits, what it adds, and the layer that it is saved as."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.layers import Layer
from lora_diffusion.config.adapter import AdapterConfig

NAME = "update"
"""Of the submodule that holds an update."""
Frozen = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """How large a module's update is."""

    rank: int
    scale: float
    """What the product of the factors is multiplied by."""
    config: AdapterConfig


@dataclass(frozen=True, kw_only=True)
class ForwardState:
    """What holds for all updates of a base during one pass."""

    active: bool = True
    """Whether they do anything."""
    weight: float = 1.0
    """What they are multiplied by."""
    used: Mapping[tuple[int, int], Tensor] = field(default_factory=dict[tuple[int, int], Tensor])
    """For updates of least and whole rank (l, r): (n, r), true for each direction that a sample uses."""


class AdapterState:
    """Where the updates of a base look the conditions up."""

    def __init__(self) -> None:
        self.now = ForwardState()

    @contextmanager
    def overridden(self, conditions: ForwardState) -> Iterator[None]:
        """Other conditions while the block runs."""
        before, self.now = self.now, conditions
        try:
            yield
        finally:
            self.now = before

    def checkpoint(self, module: Any, *inputs: Any) -> Any:
        """The module's output, computed again on the way back under the conditions of the way there."""
        then = self.now

        def recompute(*same: Any) -> Any:
            with self.overridden(then):
                return module(*same)

        return checkpoint(recompute, *inputs, use_reentrant=False)


class TrainableLayer(nn.Module, ABC):
    """Trainable parameters beside a frozen module."""

    def __init__(self) -> None:
        super().__init__()
        self.state = AdapterState()

    @abstractmethod
    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        """The module's output with the update; `frozen` is the module's own forward."""

    @abstractmethod
    def layer(self) -> Layer:
        """The update as it is saved, float32; its tensors may be the parameters themselves."""

    def bias(self) -> Tensor | None:
        """What it adds to the module's bias, if anything."""
        return None


class AdditiveLayer(TrainableLayer):
    """An update that is added to the frozen module's output."""

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        return frozen(module, x) + self.forward_delta(module, x)

    @abstractmethod
    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        """What it adds to the module's output."""


def attach(module: Any, update: TrainableLayer) -> None:
    """Put an update on a module, whose forward goes through it from now on."""
    frozen = type(module).forward

    def forward(x: Tensor) -> Tensor:
        return update.output(module, x, frozen) if update.state.now.active else frozen(module, x)

    module.add_module(NAME, update)
    module.forward = forward


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform noise whose bound is the root of one over the inputs: Kaiming's for a = sqrt(5), as PEFT and kohya."""
    values = torch.empty(shape)
    bound = values[0].numel() ** -0.5
    return values.uniform_(-bound, bound, generator=generator)


def make_parameter(values: Tensor, module: Any) -> nn.Parameter:
    """A parameter, float32, where the module's weight is."""
    return nn.Parameter(values.float().to(module.weight.device))
