"""Sparse LoRA: directions behind gates that are pulled to zero, and a share of them that is kept [arXiv:2311.11696].

    W x + scale * B diag(gate) A x

The pull is the proximal step of an L1 penalty on the gates, so that they come to be exactly zero. From the middle of
the run on, only the strongest share of all directions is kept, of the UNet and of each text encoder apart, which learn
at rates of their own. Directions that are gone are not saved, which makes the file smaller.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.training.methods.base import AdapterSize, make_parameter
from lora_diffusion.training.methods.callbacks import MethodCallbacks, RateOf
from lora_diffusion.training.methods.lora import TrainableLoRA, drop_pruned

PRUNED_FROM = 0.5
"""Share of the run from which on directions are taken away, so that the others can learn to do without."""


class TrainableSparseLoRA(TrainableLoRA):
    """LoRA with a gate for each direction."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(module, size, generator)
        self.gate = make_parameter(torch.ones(size.rank), module)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.gate.view(-1, *[1] * (self.down.ndim - 1)) * self.down, self.up

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        return drop_pruned(self.factors(), self.gate)

    def compute_strengths(self) -> Tensor:
        """Norm of what each direction adds, (r,)."""
        return self.scale * self.gate.abs() * self.down.flatten(1).norm(dim=1) * self.up.flatten(1).norm(dim=0)


class SparseCallbacks(MethodCallbacks):
    """Pulls gates to zero and takes the weakest directions away."""

    def __init__(self, components: Sequence[Sequence[TrainableSparseLoRA]], config: AdapterConfig, steps: int) -> None:
        self.components, self.l1, self.keep, self.steps = components, config.sparse_l1, config.sparse_keep, steps
        self.updates = [update for updates in components for update in updates]

    @torch.no_grad()
    def after_step(self, step: int, rate_of: RateOf) -> None:
        if self.l1:
            for update in self.updates:
                gate = update.gate
                gate.copy_(gate.sign() * (gate.abs() - rate_of(gate) * self.l1).clamp(min=0))
        if step + 1 >= PRUNED_FROM * self.steps and self.keep < 1:
            for updates in self.components:
                prune_directions(updates, self.keep)

    def is_stable(self, step: int) -> bool:
        return self.keep == 1 or step >= PRUNED_FROM * self.steps

    def report(self) -> dict[str, Any]:
        left = sum(int((update.gate != 0).sum()) for update in self.updates)
        return {"directions_left": left, "share_left": left / sum(update.gate.numel() for update in self.updates)}


def prune_directions(updates: Sequence[TrainableSparseLoRA], keep: float) -> None:
    """Close all gates but those of the strongest share of directions."""
    strengths = [update.compute_strengths() for update in updates]
    ordered = torch.cat(strengths).sort(descending=True).values
    least = ordered[max(1, round(keep * len(ordered))) - 1]
    for update, strength in zip(updates, strengths, strict=True):
        update.gate[strength < least] = 0
