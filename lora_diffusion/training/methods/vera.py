"""VeRA [arXiv:2310.11454]: one frozen pair of random factors for all modules and two trained vectors per module.

    y = W x + scale * diag(b) B diag(d) A x

The file is plain LoRA with the factors diag(d) A and diag(b) B, which every tool can read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.inference.in_place import weight_shape
from lora_diffusion.training.methods.base import AdapterSize, kaiming_uniform, make_parameter
from lora_diffusion.training.methods.lora import LowRankLayer

_D_INIT = 0.1
"""Initial value of `d`, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class VeRAFactors:
    """The frozen factors that all modules share, with the dimensions of the largest module.

    Smaller modules use the first columns of `down` and the first rows of `up`.
    """

    down: Tensor = field(repr=False)
    """A (r, max_in), where max_in is the largest in * kh * kw of any module."""
    up: Tensor = field(repr=False)
    """B (max_out, r), where max_out is the largest number of outputs of any module."""


def make_vera_factors(modules: Sequence[Any], rank: int, generator: torch.Generator) -> VeRAFactors:
    """Draw the shared factors; they can be redrawn from the seed and so are not part of the training state."""
    shapes = [weight_shape(module) for module in modules]
    max_in = max(prod(shape[1:]) for shape in shapes)
    max_out = max(shape[0] for shape in shapes)
    device = modules[0].weight.device
    return VeRAFactors(
        down=kaiming_uniform((rank, max_in), generator).to(device),
        up=kaiming_uniform((max_out, rank), generator).to(device),
    )


class TrainableVeRA(LowRankLayer):
    """The two trained vectors of a module: `d` (r,), initially 0.1, and `b` (out,), initially 0."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, shared: VeRAFactors) -> None:
        super().__init__(size)
        shape = weight_shape(module)
        self.shared_down = shared.down[:, : prod(shape[1:])].reshape(-1, *shape[1:])
        self.shared_up = shared.up[: shape[0]].reshape(shape[0], -1, *[1] * (len(shape) - 2))
        self.d = make_parameter(torch.full((size.rank,), _D_INIT), module)
        self.b = make_parameter(torch.zeros(shape[0]), module)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(d) A and diag(b) B."""
        ones = [1] * (self.shared_down.ndim - 1)
        return self.d.view(-1, *ones) * self.shared_down, self.b.view(-1, *ones) * self.shared_up
