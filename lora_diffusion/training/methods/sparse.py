"""Sparse LoRA [arXiv:2311.11696]: a gate for each direction, an L1 penalty on the gates, and pruning.

    y = W x + scale * up diag(gate) down x

The L1 penalty is applied as its proximal step, so that gates become exactly zero. From the middle of the run on, only
the strongest directions are kept. The UNet and each text encoder are pruned separately, because they learn at different
rates. Pruned directions are not saved, which makes the file smaller.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.training.methods.base import AdapterSize, make_parameter
from lora_diffusion.training.methods.callbacks import MethodCallbacks, RateOf
from lora_diffusion.training.methods.lora import TrainableLoRA, drop_pruned

_LINALG: Any = torch.linalg  # PyTorch does not annotate its functions

_PRUNING_START = 0.5
"""Fraction of the run at which pruning starts; the second half lets the remaining directions adapt to it."""


class TrainableSparseLoRA(TrainableLoRA):
    """LoRA with a trained gate, initially 1, for each direction."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(module, size, generator)
        self.gate = make_parameter(torch.ones(size.rank), module)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(gate) down and up."""
        return self.gate.view(-1, *[1] * (self.down.ndim - 1)) * self.down, self.up

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors without the directions whose gate is zero."""
        return drop_pruned(self.factors(), self.gate)

    def compute_strengths(self) -> Tensor:
        """Compute the Frobenius norm (r,) of what each direction adds to the weight."""
        down_norms = _LINALG.vector_norm(self.down.flatten(1), dim=1)
        up_norms = _LINALG.vector_norm(self.up.flatten(1), dim=0)
        return self.scale * self.gate.abs() * down_norms * up_norms


class SparseCallbacks(MethodCallbacks):
    """Applies the L1 penalty to the gates and prunes the weakest directions of each component.

    Args:
        components: The layers of the UNet and of each text encoder, each pruned separately.
        config: Settings `sparse_l1`, the strength of the penalty, and `sparse_keep`, the share of directions kept.
        steps: Number of steps of the run.
    """

    def __init__(self, components: Sequence[Sequence[TrainableSparseLoRA]], config: AdapterConfig, steps: int) -> None:
        self.components, self.l1, self.keep, self.steps = components, config.sparse_l1, config.sparse_keep, steps
        self.layers = [layer for layers in components for layer in layers]

    @torch.no_grad()
    def after_step(self, step: int, rate_of: RateOf) -> None:
        """Shrink the gates by learning rate * l1, and prune from the middle of the run on."""
        if self.l1:
            for layer in self.layers:
                gate = layer.gate
                gate.copy_(gate.sign() * (gate.abs() - rate_of(gate) * self.l1).clamp(min=0))
        if step + 1 >= _PRUNING_START * self.steps and self.keep < 1:
            for layers in self.components:
                _prune_directions(layers, self.keep)

    def is_stable(self, step: int) -> bool:
        """Return whether pruning has started, or there is none."""
        return self.keep == 1 or step >= _PRUNING_START * self.steps

    def report(self) -> dict[str, Any]:
        """Return the number and the share of directions whose gate is not zero."""
        remaining = sum(int((layer.gate != 0).sum()) for layer in self.layers)
        return {
            "directions_left": remaining,
            "share_left": remaining / sum(layer.gate.numel() for layer in self.layers),
        }


def _prune_directions(layers: Sequence[TrainableSparseLoRA], keep: float) -> None:
    """Set the gates of all but the strongest share `keep` of the directions to zero."""
    strengths = [layer.compute_strengths() for layer in layers]
    ordered = torch.cat(strengths).sort(descending=True).values
    threshold = ordered[max(1, round(keep * len(ordered))) - 1]
    for layer, strength in zip(layers, strengths, strict=True):
        layer.gate[strength < threshold] = 0
