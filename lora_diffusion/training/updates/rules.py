"""What a kind does to all its updates together, from step to step; most do nothing."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor


class Rules:
    """Called by the loop, in this order at each step. State is a function of the step, or kept with the run's."""

    def before_step(self, step: int) -> None:
        """Before the first batch of a step, counted from 0."""

    def penalty(self) -> Tensor | None:
        """What is added to each batch's loss."""
        return None

    def after_gradients(self, step: int) -> None:
        """When the gradients of a step are whole and not yet used."""

    def after_step(self, step: int, rate: float) -> None:
        """When the parameters have moved, at this learning rate."""

    def state_dict(self) -> dict[str, Any]:
        """What a stopped run needs to go on, besides the parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""

    def cuts(self) -> dict[int, AbstractContextManager[None]]:
        """Ranks that the file can be cut to, each with what evaluates it so."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What is told of the method at the end of a run."""
        return {}


class Together(Rules):
    """Several methods at once."""

    def __init__(self, *parts: Rules) -> None:
        self.parts = parts

    def before_step(self, step: int) -> None:
        for part in self.parts:
            part.before_step(step)

    def penalty(self) -> Tensor | None:
        found = [value for part in self.parts if (value := part.penalty()) is not None]
        return sum(found[1:], start=found[0]) if found else None

    def after_gradients(self, step: int) -> None:
        for part in self.parts:
            part.after_gradients(step)

    def after_step(self, step: int, rate: float) -> None:
        for part in self.parts:
            part.after_step(step, rate)

    def state_dict(self) -> dict[str, Any]:
        return {str(place): part.state_dict() for place, part in enumerate(self.parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for place, part in enumerate(self.parts):
            part.load_state_dict(state[str(place)])

    def cuts(self) -> dict[int, AbstractContextManager[None]]:
        return {rank: cut for part in self.parts for rank, cut in part.cuts().items()}

    def facts(self) -> dict[str, Any]:
        return {key: value for part in self.parts for key, value in part.facts().items()}
