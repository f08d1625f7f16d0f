"""LoRA: two factors [arXiv:2106.09685]. Other kinds are ways to make these factors of something else."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.inference.in_place import weight_shape
from lora_diffusion.training.methods.base import AdapterSize, AdditiveLayer, Frozen, kaiming_uniform, make_parameter
from lora_diffusion.training.methods.fused_ops import cast_for_compute, forward_with_update


class LowRankLayer(AdditiveLayer):
    """A delta that is the product of two factors, whatever these are made of."""

    repeated = 1
    """How often each direction stands in the factors, one after all others."""

    def __init__(self, size: AdapterSize) -> None:
        super().__init__()
        self.scale, self.config = size.scale, size.config

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """`down` (r, in[, kh, kw]) and `up` (out, r[, 1, 1]) as they are used now."""

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """`down` and `up` as they are saved."""
        return self.factors()

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        if (self.training and self.config.dropout) or not module.weight.dtype.is_floating_point:  # quantized
            return super().output(module, x, frozen)
        down, up = self.factors()
        return forward_with_update(module, x, self.apply_rank_dropout(down), up, self.current_scale)

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        down, up = self.factors()
        thin = functional.dropout(x, self.config.dropout, self.training)
        return low_rank_forward(module, thin, self.apply_rank_dropout(down), up, self.current_scale)

    @property
    def current_scale(self) -> float:
        """What the product of the factors is multiplied by now."""
        return self.scale * self.state.now.weight

    def apply_rank_dropout(self, down: Tensor) -> Tensor:
        """`down` without the directions that are dropped in this step; the others stand in for them."""
        config = self.config
        if not self.training:
            return down
        if config.rank_dropout:
            kept = torch.rand(down.shape[0] // self.repeated, device=down.device) >= config.rank_dropout
            kept = kept.repeat(self.repeated) / (1 - config.rank_dropout)
            down = down * kept.view(-1, *[1] * (down.ndim - 1))
        if config.module_dropout:
            down = down * (torch.rand((), device=down.device) >= config.module_dropout)
        return down

    def layer(self) -> LoRALayer:
        down, up = self.saved_factors()
        return LoRALayer(down=down, up=up, alpha=self.scale * down.shape[0])


class TrainableLoRA(LowRankLayer):
    """The two factors themselves."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(size)
        shape = weight_shape(module)
        down = kaiming_uniform((size.rank, *shape[1:]), generator)
        up = torch.zeros(shape[0], size.rank, *[1] * (len(shape) - 2))
        self.down = make_parameter(
            orthogonalize(down, generator) if size.config.start == "orthogonal" else down, module
        )
        self.up = make_parameter(up, module)
        self.down.requires_grad_(not size.config.freeze_down)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up


def drop_pruned(factors: tuple[Tensor, Tensor], strengths: Tensor) -> tuple[Tensor, Tensor]:
    """The directions whose strength is not 0; one at least, as a layer has one, though it may be zero."""
    left = strengths.detach() != 0
    left[0] |= not bool(left.any())
    return factors[0][left], factors[1][:, left]


def low_rank_forward(module: Any, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The update's part alone, by autograd."""
    down, up = (cast_for_compute(factor, x) for factor in (down, up))
    if isinstance(module, nn.Linear):
        return scale * functional.linear(functional.linear(x, down), up)
    inner = functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
    return scale * functional.conv2d(inner, up)


def orthogonalize(down: Tensor, generator: torch.Generator) -> Tensor:
    """Rows at right angles, as long as they would be otherwise: no two directions begin by saying the same.

    Of more rows than inputs those beyond stay as they are.
    """
    noise = torch.randn(down[0].numel(), down.shape[0], generator=generator)
    rows, flat = torch.linalg.qr(noise).Q.T, down.flatten(1)
    turned = rows * flat.norm(dim=1, keepdim=True)[: len(rows)]
    return torch.cat([turned, flat[len(rows) :]]).reshape(down.shape)
