"""AdaLoRA [arXiv:2303.10512]: LoRA in SVD form that distributes a budget of directions over all modules.

    y = W x + scale * P diag(strength) Q x

All modules start with more directions than the final mean rank. A cubic schedule lowers the total budget, and the
directions with the lowest importance over all modules (smoothed sensitivity times uncertainty) get strength 0. The
file is plain LoRA in which each module has the rank that is left to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.inference.in_place import weight_shape
from lora_diffusion.training.methods.base import AdapterSize, make_parameter
from lora_diffusion.training.methods.callbacks import MethodCallbacks, RateOf
from lora_diffusion.training.methods.lora import LowRankLayer, drop_pruned

_INIT_STD = 0.02
"""Standard deviation of the initial factors, as in the authors' code."""
_SMOOTHING = 0.85
"""Decay of the moving averages of sensitivity and uncertainty, the paper's beta_1 and beta_2."""
_PENALTY_WEIGHT = 0.1
"""Weight of the orthogonality penalty, the paper's gamma."""
_PRUNING_START, _PRUNING_END = 0.15, 0.6
"""Fractions of the run at which the budget starts to fall and reaches its final value."""
_ALLOCATION_INTERVAL = 10
"""Steps between two allocations of the budget."""


class TrainableAdaLoRA(LowRankLayer):
    """Factors `up` (P) and `down` (Q), which a penalty keeps orthonormal, and a strength for each direction."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(size)
        shape = weight_shape(module)
        initial_rank = round(size.rank * size.config.adalora_init_ratio)
        self.down = make_parameter(_INIT_STD * torch.randn(initial_rank, *shape[1:], generator=generator), module)
        up = _INIT_STD * torch.randn(shape[0], initial_rank, generator=generator)
        self.up = make_parameter(up.reshape(*up.shape, *[1] * (len(shape) - 2)), module)
        self.strength = make_parameter(torch.zeros(initial_rank), module)
        self.final_rank = size.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(strength) Q and P."""
        return self.strength.view(-1, *[1] * (self.down.ndim - 1)) * self.down, self.up

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors without the pruned directions."""
        return drop_pruned(self.factors(), self.strength)

    def penalty(self) -> Tensor:
        """Return ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2, a scalar."""
        down, up = self.down.flatten(1), self.up.flatten(1)
        identity = torch.eye(down.shape[0], device=down.device)
        return (down @ down.T - identity).square().sum() + (up.T @ up - identity).square().sum()


class AdaLoRACallbacks(MethodCallbacks):
    """Tracks the importance of all directions and prunes those that exceed the budget of the step."""

    def __init__(self, layers: Sequence[TrainableAdaLoRA], steps: int) -> None:
        self.layers, self.steps = layers, steps
        self.initial_budget = sum(layer.strength.numel() for layer in layers)
        self.final_budget = sum(layer.final_rank for layer in layers)
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []

    def penalty(self) -> Tensor:
        """Return the weighted mean of the orthogonality penalties of all layers."""
        return _PENALTY_WEIGHT * torch.stack([layer.penalty() for layer in self.layers]).mean()

    def budget_at(self, step: int) -> int:
        """Return the total number of directions that may be left after a number of steps."""
        start, end = _PRUNING_START * self.steps, _PRUNING_END * self.steps
        remaining = min(1.0, max(0.0, (end - step) / max(1.0, end - start)))
        return self.final_budget + round((self.initial_budget - self.final_budget) * remaining**3)

    @torch.no_grad()
    def after_gradients(self, step: int) -> None:  # noqa: ARG002 (all steps are smoothed alike)
        """Update the moving averages of sensitivity and uncertainty from the gradients."""
        parameters = self._parameters()
        if not self.sensitivity:
            self.sensitivity = [torch.zeros_like(p) for p in parameters]
            self.uncertainty = [torch.zeros_like(p) for p in parameters]
        for p, sensitivity, uncertainty in zip(parameters, self.sensitivity, self.uncertainty, strict=True):
            if p.grad is None:
                continue
            current = (p * p.grad).abs()
            sensitivity.lerp_(current, 1 - _SMOOTHING)
            uncertainty.lerp_((current - sensitivity).abs(), 1 - _SMOOTHING)

    @torch.no_grad()
    def after_step(self, step: int, rate_of: RateOf) -> None:  # noqa: ARG002 (pruning does not depend on the rate)
        """Set the strength of the least important directions to zero when an allocation is due."""
        budget = self.budget_at(step + 1)
        if (
            not self.sensitivity
            or budget >= self.initial_budget
            or not (step % _ALLOCATION_INTERVAL == 0 or step + 1 == self.steps or budget == self.final_budget)
        ):
            return
        scores = self.compute_importance()
        threshold = torch.cat(scores).sort(descending=True).values[budget - 1]
        for layer, score in zip(self.layers, scores, strict=True):
            layer.strength[score < threshold] = 0

    def compute_importance(self) -> list[Tensor]:
        """Compute the importance (r,) of the directions of each layer.

        It is the importance of the strength plus the mean importance of the entries of both vectors of a direction.
        """
        scores: list[Tensor] = []
        for index in range(len(self.layers)):
            strength, down, up = (
                self.sensitivity[3 * index + part] * self.uncertainty[3 * index + part] for part in range(3)
            )
            scores.append(strength + down.flatten(1).mean(dim=1) + up.flatten(1).mean(dim=0))
        return scores

    def is_stable(self, step: int) -> bool:
        """Return whether the budget has reached its final value."""
        return self.budget_at(step) == self.final_budget

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages."""
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the moving averages on the devices of the parameters."""
        devices = [p.device for p in self._parameters()]
        self.sensitivity, self.uncertainty = (
            [values.to(device) for values, device in zip(state[name], devices, strict=False)]
            for name in ("sensitivity", "uncertainty")
        )

    def report(self) -> dict[str, Any]:
        """Return the initial and the current number of directions."""
        remaining = sum(int((layer.strength != 0).sum()) for layer in self.layers)
        return {"directions_begun": self.initial_budget, "directions_left": remaining}

    def _parameters(self) -> list[nn.Parameter]:
        """Return strength, down and up of each layer, in the order of the moving averages."""
        return [p for layer in self.layers for p in (layer.strength, layer.down, layer.up)]
