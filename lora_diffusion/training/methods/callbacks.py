"""Callbacks through which a training method acts on all its layers between the phases of a training step."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

RateOf = Callable[[nn.Parameter], float]
"""A function that returns the learning rate of a parameter in the current step."""


class MethodCallbacks:
    """Hooks of the training loop; the default does nothing.

    In each step the loop calls `before_step`, `penalty`, `frozen_parameters`, `after_gradients` and `after_step`, in
    this order. State must be a function of the step, or be in `state_dict`, so that a resumed run is bit-identical.
    """

    def before_step(self, step: int) -> None:
        """Prepare a step before its first batch; steps count from 0."""

    def penalty(self) -> Tensor | None:
        """Return a scalar that is added to the loss of each batch, or None."""
        return None

    def frozen_parameters(self, step: int) -> Iterable[nn.Parameter]:  # noqa: ARG002 (used by subclasses)
        """Return the parameters that are not trained in this step; the loop drops their gradients."""
        return ()

    def after_gradients(self, step: int) -> None:
        """Read the gradients, which are complete and finite, before the optimizer step."""

    def after_step(self, step: int, rate_of: RateOf) -> None:
        """Change the parameters after the optimizer step.

        Args:
            step: Number of the step, from 0.
            rate_of: Returns the learning rate that a parameter had in this step.
        """

    def is_stable(self, step: int) -> bool:  # noqa: ARG002 (used by subclasses)
        """Return whether, after `step` steps, exactly the parameters of the final file are trained.

        The moving average and the selection of the best checkpoint start only when this is true.
        """
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs besides the parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""

    def truncations(self) -> dict[int, AbstractContextManager[None]]:
        """Return the ranks to which the saved file can be truncated, each with a context that applies it."""
        return {}

    def report(self) -> dict[str, Any]:
        """Return facts about the method for the metadata of the trained adapter."""
        return {}


class CallbackList(MethodCallbacks):
    """The callbacks of several methods, called in order."""

    def __init__(self, *callbacks: MethodCallbacks) -> None:
        self.callbacks = callbacks

    def before_step(self, step: int) -> None:
        """Call `before_step` of each."""
        for callback in self.callbacks:
            callback.before_step(step)

    def penalty(self) -> Tensor | None:
        """Return the sum of all penalties, or None if there is none."""
        penalties = [value for callback in self.callbacks if (value := callback.penalty()) is not None]
        return sum(penalties[1:], start=penalties[0]) if penalties else None

    def frozen_parameters(self, step: int) -> Iterable[nn.Parameter]:
        """Return the parameters that any callback freezes in this step."""
        return [parameter for callback in self.callbacks for parameter in callback.frozen_parameters(step)]

    def after_gradients(self, step: int) -> None:
        """Call `after_gradients` of each."""
        for callback in self.callbacks:
            callback.after_gradients(step)

    def after_step(self, step: int, rate_of: RateOf) -> None:
        """Call `after_step` of each."""
        for callback in self.callbacks:
            callback.after_step(step, rate_of)

    def is_stable(self, step: int) -> bool:
        """Return whether all callbacks are stable after `step` steps."""
        return all(callback.is_stable(step) for callback in self.callbacks)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all callbacks by position."""
        return {str(index): callback.state_dict() for index, callback in enumerate(self.callbacks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the states of all callbacks by position."""
        for index, callback in enumerate(self.callbacks):
            callback.load_state_dict(state[str(index)])

    def truncations(self) -> dict[int, AbstractContextManager[None]]:
        """Return the truncations of all callbacks."""
        return {rank: context for callback in self.callbacks for rank, context in callback.truncations().items()}

    def report(self) -> dict[str, Any]:
        """Return the reports of all callbacks, merged."""
        return {key: value for callback in self.callbacks for key, value in callback.report().items()}
