"""LoRA [arXiv:2106.09685]: y = W x + scale * up @ down @ x.

`LowRankLayer` is the base class of all methods whose delta is a product of two factors; PiSSA, VeRA, AdaLoRA, DyLoRA,
sparse LoRA and T-LoRA differ in how they compute the factors.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.inference.in_place import weight_shape
from lora_diffusion.inference.low_rank_forward import low_rank_forward
from lora_diffusion.training.methods.base import (
    AdapterSize,
    AdditiveLayer,
    BaseForward,
    kaiming_uniform,
    make_parameter,
)
from lora_diffusion.training.methods.fused_ops import cast_for_compute, forward_with_update

_LINALG: Any = torch.linalg  # PyTorch does not annotate its functions


class LowRankLayer(AdditiveLayer):
    """A trainable layer whose delta is scale * up @ down, however the factors are computed."""

    repeated = 1
    """How often the list of directions is repeated in the factors; rank dropout drops all copies of one together."""

    def __init__(self, size: AdapterSize) -> None:
        super().__init__()
        self.scale, self.config = size.scale, size.config

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `down` (r, in[, kh, kw]) and `up` (out, r[, 1, 1]) for the current forward pass."""

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """Return `down` and `up` as they are saved."""
        return self.factors()

    def output(self, module: Any, x: Tensor, base_forward: BaseForward) -> Tensor:
        """Compute the adapted output, by the fused operations unless there is dropout or a quantized weight."""
        if (self.training and self.config.dropout) or not module.weight.dtype.is_floating_point:  # quantized
            return super().output(module, x, base_forward)
        down, up = self.factors()
        return forward_with_update(module, x, self.apply_rank_dropout(down), up, self.current_scale)

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        """Compute scale * up @ down @ dropout(x)."""
        down, up = self.factors()
        x = functional.dropout(x, self.config.dropout, self.training)
        down, up = (cast_for_compute(factor, x) for factor in (self.apply_rank_dropout(down), up))
        return low_rank_forward(module, x, down, up, scale=self.current_scale)

    @property
    def current_scale(self) -> float:
        """Multiplier of the product of the factors in this forward pass: the scale times the adapter's weight."""
        return self.scale * self.state.current.weight

    def apply_rank_dropout(self, down: Tensor) -> Tensor:
        """Return `down` with rank dropout and module dropout applied; unchanged in evaluation mode.

        The directions that remain after rank dropout are scaled by 1 / (1 - p). Module dropout sets all directions to
        zero, without scaling.
        """
        config = self.config
        if not self.training:
            return down
        if config.rank_dropout:
            mask = torch.rand(down.shape[0] // self.repeated, device=down.device) >= config.rank_dropout
            mask = mask.repeat(self.repeated) / (1 - config.rank_dropout)
            down = down * mask.view(-1, *[1] * (down.ndim - 1))
        if config.module_dropout:
            down = down * (torch.rand((), device=down.device) >= config.module_dropout)
        return down

    def layer(self) -> LoRALayer:
        """Return the saved factors as a plain LoRA layer."""
        down, up = self.saved_factors()
        return LoRALayer(down=down, up=up, alpha=self.scale * down.shape[0])


class TrainableLoRA(LowRankLayer):
    """LoRA with `down` drawn from Kaiming's uniform distribution or orthogonal, and `up` zero.

    `down` is frozen with `freeze_down` (LoRA-FA, arXiv:2308.03303).
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(size)
        shape = weight_shape(module)
        down = kaiming_uniform((size.rank, *shape[1:]), generator)
        up = torch.zeros(shape[0], size.rank, *[1] * (len(shape) - 2))
        self.down = make_parameter(
            _orthogonalize(down, generator) if size.config.init_weights == "orthogonal" else down, module
        )
        self.up = make_parameter(up, module)
        self.down.requires_grad_(not size.config.freeze_down)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two parameters."""
        return self.down, self.up


def drop_pruned(factors: tuple[Tensor, Tensor], strengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return `down` and `up` without the directions of zero strength.

    A layer needs at least one direction, so the first one is kept if all strengths are zero.

    Args:
        factors: `down` (r, in[, kh, kw]) and `up` (out, r[, 1, 1]).
        strengths: (r,); a direction is dropped where this is 0.
    """
    mask = strengths.detach() != 0
    mask[0] |= not bool(mask.any())
    return factors[0][mask], factors[1][:, mask]


def _orthogonalize(down: Tensor, generator: torch.Generator) -> Tensor:
    """Return random orthogonal rows with the norms of the rows of `down`.

    If the rank exceeds the number of inputs, the rows beyond it stay as they are.
    """
    noise = torch.randn(down[0].numel(), down.shape[0], generator=generator)
    basis, _ = _LINALG.qr(noise)
    rows, flat = basis.T, down.flatten(1)
    orthogonal = rows * _LINALG.vector_norm(flat, dim=1, keepdim=True)[: len(rows)]
    return torch.cat([orthogonal, flat[len(rows) :]]).reshape(down.shape)
