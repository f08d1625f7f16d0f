"""What a kind does to all its updates together, from step to step; most do nothing."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

RateOf = Callable[[nn.Parameter], float]
"""The learning rate of a parameter in this step."""


class MethodCallbacks:
    """Called by the loop, in this order at each step. State is a function of the step, or kept with the run's."""

    def before_step(self, step: int) -> None:
        """Before the first batch of a step, counted from 0."""

    def penalty(self) -> Tensor | None:
        """What is added to each batch's loss."""
        return None

    def frozen_parameters(self, step: int) -> Iterable[nn.Parameter]:  # noqa: ARG002 (most methods rest nothing)
        """Parameters that do not learn in this step."""
        return ()

    def after_gradients(self, step: int) -> None:
        """When the gradients of a step are whole, finite and not yet used."""

    def after_step(self, step: int, rate_of: RateOf) -> None:
        """When the parameters have moved, each at its learning rate."""

    def is_stable(self, step: int) -> bool:  # noqa: ARG002 (most methods are from the start)
        """Whether after so many steps all that is saved at the end learns, and no more than that."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a stopped run needs to go on, besides the parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""

    def truncations(self) -> dict[int, AbstractContextManager[None]]:
        """Ranks that the file can be cut to, each with what evaluates it so."""
        return {}

    def report(self) -> dict[str, Any]:
        """What is told of the method at the end of a run."""
        return {}


class CallbackList(MethodCallbacks):
    """Several methods at once."""

    def __init__(self, *parts: MethodCallbacks) -> None:
        self.parts = parts

    def before_step(self, step: int) -> None:
        for part in self.parts:
            part.before_step(step)

    def penalty(self) -> Tensor | None:
        found = [value for part in self.parts if (value := part.penalty()) is not None]
        return sum(found[1:], start=found[0]) if found else None

    def frozen_parameters(self, step: int) -> Iterable[nn.Parameter]:
        return [parameter for part in self.parts for parameter in part.frozen_parameters(step)]

    def after_gradients(self, step: int) -> None:
        for part in self.parts:
            part.after_gradients(step)

    def after_step(self, step: int, rate_of: RateOf) -> None:
        for part in self.parts:
            part.after_step(step, rate_of)

    def is_stable(self, step: int) -> bool:
        return all(part.is_stable(step) for part in self.parts)

    def state_dict(self) -> dict[str, Any]:
        return {str(place): part.state_dict() for place, part in enumerate(self.parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for place, part in enumerate(self.parts):
            part.load_state_dict(state[str(place)])

    def truncations(self) -> dict[int, AbstractContextManager[None]]:
        return {rank: cut for part in self.parts for rank, cut in part.truncations().items()}

    def report(self) -> dict[str, Any]:
        return {key: value for part in self.parts for key, value in part.report().items()}
