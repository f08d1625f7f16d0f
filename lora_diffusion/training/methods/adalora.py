"""AdaLoRA: directions with a strength of their own, taken from where they matter least [arXiv:2303.10512].

    W x + scale * P diag(strength) Q x

All modules begin with more directions than they will end with. A cubic schedule takes the budget down, and directions
whose importance (sensitivity times uncertainty, smoothed) is lowest over all modules get strength 0. Saved as plain
LoRA, each module with the directions that are left to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.inference.in_place import weight_shape
from lora_diffusion.training.methods.base import AdapterSize, make_parameter
from lora_diffusion.training.methods.callbacks import MethodCallbacks, RateOf
from lora_diffusion.training.methods.lora import LowRankLayer, drop_pruned

SPREAD = 0.02
"""Of the first factors, as the authors' code has it."""
SMOOTHING = 0.85
"""Of sensitivity and of uncertainty; the paper's beta 1 and beta 2."""
PENALTY = 0.1
"""How much rows that are not orthonormal cost; the paper's gamma."""
BEGIN, END = 0.15, 0.6
"""Shares of the run at which the budget begins to fall and is at its end."""
EVERY = 10
"""Steps between two allocations."""


class TrainableAdaLoRA(LowRankLayer):
    """Orthonormal factors and a strength for each direction."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(size)
        shape = weight_shape(module)
        begun = round(size.rank * size.config.adalora_start)
        self.down = make_parameter(SPREAD * torch.randn(begun, *shape[1:], generator=generator), module)
        up = SPREAD * torch.randn(shape[0], begun, generator=generator)
        self.up = make_parameter(up.reshape(*up.shape, *[1] * (len(shape) - 2)), module)
        self.strength = make_parameter(torch.zeros(begun), module)
        self.final_rank = size.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.strength.view(-1, *[1] * (self.down.ndim - 1)) * self.down, self.up

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        return drop_pruned(self.factors(), self.strength)

    def penalty(self) -> Tensor:
        """How far both factors are from orthonormal."""
        down, up = self.down.flatten(1), self.up.flatten(1)
        one = torch.eye(down.shape[0], device=down.device)
        return (down @ down.T - one).square().sum() + (up.T @ up - one).square().sum()


class AdaLoRACallbacks(MethodCallbacks):
    """Hands the budget out."""

    def __init__(self, updates: Sequence[TrainableAdaLoRA], steps: int) -> None:
        self.updates, self.steps = updates, steps
        self.first = sum(update.strength.numel() for update in updates)
        self.last = sum(update.final_rank for update in updates)
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []

    def penalty(self) -> Tensor:
        return PENALTY * torch.stack([update.penalty() for update in self.updates]).mean()

    def budget_at(self, step: int) -> int:
        """How many directions there are after a step."""
        begin, end = BEGIN * self.steps, END * self.steps
        left = min(1.0, max(0.0, (end - step) / max(1.0, end - begin)))
        return self.last + round((self.first - self.last) * left**3)

    @torch.no_grad()
    def after_gradients(self, step: int) -> None:  # noqa: ARG002 (smoothed over all steps alike)
        found = [p for update in self.updates for p in (update.strength, update.down, update.up)]
        if not self.sensitivity:
            self.sensitivity = [torch.zeros_like(p) for p in found]
            self.uncertainty = [torch.zeros_like(p) for p in found]
        for p, sensitivity, uncertainty in zip(found, self.sensitivity, self.uncertainty, strict=True):
            if p.grad is None:
                continue
            now = (p * p.grad).abs()
            sensitivity.lerp_(now, 1 - SMOOTHING)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - SMOOTHING)

    @torch.no_grad()
    def after_step(self, step: int, rate_of: RateOf) -> None:  # noqa: ARG002 (the budget knows no rate)
        budget = self.budget_at(step + 1)
        if (
            not self.sensitivity
            or budget >= self.first
            or not (step % EVERY == 0 or step + 1 == self.steps or budget == self.last)
        ):
            return
        scores = self.compute_importance()
        least = torch.cat(scores).sort(descending=True).values[budget - 1]
        for update, score in zip(self.updates, scores, strict=True):
            update.strength[score < least] = 0

    def compute_importance(self) -> list[Tensor]:
        """Of each direction, by module: of its strength and, on average, of its two vectors."""
        found: list[Tensor] = []
        for place in range(len(self.updates)):
            strength, down, up = (
                self.sensitivity[3 * place + part] * self.uncertainty[3 * place + part] for part in range(3)
            )
            found.append(strength + down.flatten(1).mean(dim=1) + up.flatten(1).mean(dim=0))
        return found

    def is_stable(self, step: int) -> bool:
        return self.budget_at(step) == self.last

    def state_dict(self) -> dict[str, Any]:
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        devices = [p.device for update in self.updates for p in (update.strength, update.down, update.up)]
        self.sensitivity, self.uncertainty = (
            [values.to(device) for values, device in zip(state[name], devices, strict=False)]
            for name in ("sensitivity", "uncertainty")
        )

    def report(self) -> dict[str, Any]:
        left = sum(int((update.strength != 0).sum()) for update in self.updates)
        return {"directions_begun": self.first, "directions_left": left}
