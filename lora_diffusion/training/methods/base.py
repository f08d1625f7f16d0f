"""Base classes of trainable adapter layers, and how they attach to frozen modules.

A trainable layer is a submodule of the frozen linear layer, convolution or norm that it adapts. `attach` replaces the
forward pass of the frozen module by one that calls the trainable layer. All trainable layers of a base share one
`AdapterState`, through which they can be disabled or scaled together.
"""

# torch.utils.checkpoint is untyped.
# pyright: standard

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.layers import Layer
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.models.forward_overrides import ForwardOverrides

SUBMODULE_NAME = "update"
"""Name of the submodule under which a frozen module holds its trainable layer."""
BaseForward = Callable[[Any, Tensor], Tensor]
"""The forward method of a frozen module's class, called with the module and its input."""


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """Rank and scale of one module's trainable layer."""

    rank: int
    """Rank of the factors."""
    scale: float
    """Multiplier of the product of the factors, such as alpha / rank."""
    config: AdapterConfig
    """Settings that all modules share."""


@dataclass(frozen=True, kw_only=True)
class ForwardState:
    """Settings shared by all adapter layers of a base during one forward pass."""

    active: bool = True
    """Whether the adapter layers are applied; if False, the base computes exactly what it does without them."""
    weight: float = 1.0
    """Multiplier of every delta."""
    used: Mapping[tuple[int, int], Tensor] = field(default_factory=dict[tuple[int, int], Tensor], repr=False)
    """T-LoRA's rank masks by (minimum rank, rank): (n, rank) booleans, true for the directions that a sample uses."""


class AdapterState:
    """Mutable holder of the `ForwardState` that the adapter layers of a base read in their forward pass."""

    def __init__(self) -> None:
        self.current = ForwardState()

    @contextmanager
    def override(self, state: ForwardState) -> Generator[None]:
        """Use another forward state inside the context."""
        previous, self.current = self.current, state
        try:
            yield
        finally:
            self.current = previous

    def checkpoint(self, module: Any, *inputs: Any) -> Any:
        """Call a module under gradient checkpointing.

        The backward pass may run when the forward state has already changed, so the recomputation restores the state
        of the original forward pass.
        """
        state = self.current

        def recompute(*recompute_inputs: Any) -> Any:
            with self.override(state):
                return module(*recompute_inputs)

        return checkpoint(recompute, *inputs, use_reentrant=False)


class TrainableLayer(nn.Module, ABC):
    """Trainable parameters that change the output of one frozen module."""

    def __init__(self) -> None:
        super().__init__()
        self.state = AdapterState()

    @abstractmethod
    def output(self, module: Any, x: Tensor, base_forward: BaseForward) -> Tensor:
        """Compute the adapted output of a frozen module.

        Args:
            module: The frozen module that this layer is attached to.
            x: Input of the module.
            base_forward: Forward method of the module's class, without the adapter.
        """

    @abstractmethod
    def layer(self) -> Layer:
        """Return the layer to save, in float32; its tensors may share memory with the parameters."""

    def bias(self) -> Tensor | None:
        """Return the delta of the module's bias (out,), or None if the bias is not trained."""
        return None


class AdditiveLayer(TrainableLayer):
    """A trainable layer whose output is added to that of the frozen module."""

    def output(self, module: Any, x: Tensor, base_forward: BaseForward) -> Tensor:
        """Compute the output of the frozen module plus `forward_delta`."""
        return base_forward(module, x) + self.forward_delta(module, x)

    @abstractmethod
    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        """Compute what the adapter adds to the module's output."""


def attach(module: Any, trainable: TrainableLayer) -> None:
    """Attach a trainable layer to a frozen module and replace the module's forward method in place."""
    base_forward = type(module).forward

    def forward(x: Tensor) -> Tensor:
        return trainable.output(module, x, base_forward) if trainable.state.current.active else base_forward(module, x)

    module.add_module(SUBMODULE_NAME, trainable)
    ForwardOverrides().replace(module, forward)  # never restored, because the base belongs to the training run


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a float32 tensor from U(-b, b) with b = 1 / sqrt(fan_in).

    This is Kaiming's initialization with a = sqrt(5), which PEFT and kohya use. The fan-in is the product of all
    dimensions after the first.
    """
    values = torch.empty(shape)
    bound = values[0].numel() ** -0.5
    return values.uniform_(-bound, bound, generator=generator)


def make_parameter(values: Tensor, module: Any) -> nn.Parameter:
    """Make a float32 parameter on the device of the module's weight."""
    return nn.Parameter(values.float().to(module.weight.device))
