"""VeRA: one frozen pair of random factors for all modules, and two small vectors for each [arXiv:2310.11454].

    W x + diag(b) B diag(d) A x

Saved as plain LoRA, `d * A` and `b * B`, which every tool reads; only the vectors are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.inference.in_place import weight_shape
from lora_diffusion.training.methods.base import AdapterSize, kaiming_uniform, make_parameter
from lora_diffusion.training.methods.lora import LowRankLayer

FIRST_D = 0.1
"""What `d` begins with; the paper's."""


@dataclass(frozen=True, kw_only=True)
class VeRAFactors:
    """The frozen pair, as large as the largest module needs; smaller ones use its first columns and rows."""

    down: Tensor
    """(r, most inputs)."""
    up: Tensor
    """(most outputs, r)."""


def make_vera_factors(modules: Sequence[Any], rank: int, generator: torch.Generator) -> VeRAFactors:
    """Drawn from a seed, so that they need not be kept with a state."""
    shapes = [weight_shape(module) for module in modules]
    inputs = max(prod(shape[1:]) for shape in shapes)
    outputs = max(shape[0] for shape in shapes)
    device = modules[0].weight.device
    return VeRAFactors(
        down=kaiming_uniform((rank, inputs), generator).to(device),
        up=kaiming_uniform((outputs, rank), generator).to(device),
    )


class TrainableVeRA(LowRankLayer):
    """The two vectors of a module, `d` (r) and `b` (out)."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, shared: VeRAFactors) -> None:
        super().__init__(size)
        shape = weight_shape(module)
        self.shared_down = shared.down[:, : prod(shape[1:])].reshape(-1, *shape[1:])
        self.shared_up = shared.up[: shape[0]].reshape(shape[0], -1, *[1] * (len(shape) - 2))
        self.d = make_parameter(torch.full((size.rank,), FIRST_D), module)
        self.b = make_parameter(torch.zeros(shape[0]), module)

    def factors(self) -> tuple[Tensor, Tensor]:
        along = [1] * (self.shared_down.ndim - 1)
        return self.d.view(-1, *along) * self.shared_down, self.b.view(-1, *along) * self.shared_up
