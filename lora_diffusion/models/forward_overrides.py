"""Replace the forward methods of modules, and put back the previous ones."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]
"""The forward method of a module."""


class ForwardOverrides:
    """Replaces the forward methods of modules and puts back the previous ones, including hooks of other tools."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, Forward | None]] = []

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """Replace the forward method of a module until `restore`."""
        self._replaced.append((module, vars(module).get("forward")))
        module.forward = forward  # type: ignore[method-assign]

    def add(self, module: nn.Module, forward_delta: Callable[[Tensor], Tensor]) -> None:
        """Add a function of a module's input to the module's output until `restore`.

        No tensor is modified in place, so autograd works through both summands.

        Args:
            module: Module whose first argument is its input.
            forward_delta: Returns what is added to the output, given the input.
        """
        base_forward = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return base_forward(x, *args, **kwargs) + forward_delta(x)

        self.replace(module, forward)

    def restore(self) -> None:
        """Put back the previous forward methods, in reverse order of replacement."""
        while self._replaced:
            module, previous = self._replaced[-1]
            vars(module).pop("forward", None)
            if previous is not None:
                module.forward = previous  # type: ignore[method-assign]
            self._replaced.pop()
