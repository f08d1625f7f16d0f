"""LoRA: two factors [arXiv:2106.09685]. Other kinds are ways to make these factors of something else."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.layers import LoRALayer
from lora_diffusion.patching import weight_shape
from lora_diffusion.training.updates.products import cast, updated
from lora_diffusion.training.updates.update import Frozen, Size, Update, kaiming, learned


class ProductUpdate(Update):
    """A delta that is the product of two factors, whatever these are made of."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.scale, self.config = size.scale, size.config

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """`down` (r, in[, kh, kw]) and `up` (out, r[, 1, 1]) as they are used now."""

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """`down` and `up` as they are saved."""
        return self.factors()

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        down, up = self.factors()
        if self.training:
            down = self.thinned(down)
            if self.config.dropout:
                thin = functional.dropout(x, self.config.dropout)
                return frozen(module, x) + branch(module, thin, down, up, self.scale)
        if not module.weight.dtype.is_floating_point:  # kept in codes
            return frozen(module, x) + branch(module, x, down, up, self.scale)
        return updated(module, x, down, up, self.scale)

    def thinned(self, down: Tensor) -> Tensor:
        """`down` without the directions that are dropped in this step; the others stand in for them."""
        config = self.config
        if config.rank_dropout:
            kept = torch.rand(down.shape[0], device=down.device) >= config.rank_dropout
            down = down * (kept / (1 - config.rank_dropout)).view(-1, *[1] * (down.ndim - 1))
        if config.module_dropout:
            down = down * (torch.rand((), device=down.device) >= config.module_dropout)
        return down

    def layer(self) -> LoRALayer:
        down, up = self.saved_factors()
        return LoRALayer(down=down, up=up, alpha=self.scale * down.shape[0])


class LowRankUpdate(ProductUpdate):
    """The two factors themselves."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: Size, generator: torch.Generator) -> None:
        super().__init__(size)
        shape = weight_shape(module)
        down = kaiming((size.rank, *shape[1:]), generator)
        up = torch.zeros(shape[0], size.rank, *[1] * (len(shape) - 2))
        self.down = learned(orthogonal(down, generator) if size.config.start == "orthogonal" else down, module)
        self.up = learned(up, module)
        self.down.requires_grad_(not size.config.freeze_down)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up


def left_of(factors: tuple[Tensor, Tensor], strengths: Tensor) -> tuple[Tensor, Tensor]:
    """The directions whose strength is not 0; one at least, as a layer has one, though it may be zero."""
    left = strengths.detach() != 0
    left[0] |= not bool(left.any())
    return factors[0][left], factors[1][:, left]


def branch(module: Any, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The update's part alone, by autograd."""
    down, up = (cast(factor, x) for factor in (down, up))
    if isinstance(module, nn.Linear):
        return scale * functional.linear(functional.linear(x, down), up)
    inner = functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
    return scale * functional.conv2d(inner, up)


def orthogonal(down: Tensor, generator: torch.Generator) -> Tensor:
    """Rows at right angles, as long as they would be otherwise: no two directions begin by saying the same."""
    noise = torch.randn(down[0].numel(), down.shape[0], generator=generator)
    rows = torch.linalg.qr(noise).Q.T * down.flatten(1).norm(dim=1, keepdim=True)[: noise.shape[0]]
    return rows.reshape(rows.shape[0], *down.shape[1:])
