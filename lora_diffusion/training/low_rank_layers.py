"""Trainable low-rank updates on frozen linear layers and convolutions, at nearly the frozen layers' own cost.

    y = W x + b + scale * B (A x)   [arXiv:2106.09685]

Autograd would keep the input twice and make a tensor for each product; here one function has both passes written out.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.layers import LoRALayer
from lora_diffusion.models import Base, module_at
from lora_diffusion.train_config import AdapterConfig

NAME = "low_rank"


class LowRankUpdate(nn.Module):
    """The two factors of a module, float32, and their scale."""

    def __init__(self, module: nn.Linear | nn.Conv2d, config: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__()
        weight = module.weight
        down = torch.empty(config.rank, *weight.shape[1:])
        bound = down[0].numel() ** -0.5  # Kaiming's for a = sqrt(5), which PEFT and kohya start from
        down.uniform_(-bound, bound, generator=generator)
        up = torch.zeros(weight.shape[0], config.rank, *[1] * (weight.ndim - 2))
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(up.to(weight.device))
        self.alpha = config.alpha or float(config.rank)
        self.scale = self.alpha / config.rank
        self.dropout = config.dropout
        self.active = True


def inject(base: Base, paths: Sequence[str], config: AdapterConfig, seed: int) -> dict[str, nn.Parameter]:
    """Put trainable layers at `paths`; returns the new parameters by path and factor. Everything else is frozen.

    A fresh layer changes nothing: `up` is zero. `down` depends on seed and path alone, so that a module starts alike
    whatever else is trained. Mutates the base's models. Raises KeyError for a path that the base does not have.
    """
    parameters: dict[str, nn.Parameter] = {}
    for component in base.family.components:
        getattr(base.pipe, component).requires_grad_(False)
    for path in paths:
        module: Any = module_at(base, path)
        digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        update = LowRankUpdate(module, config, generator)
        module.add_module(NAME, update)
        module.forward = forward_of(module, update)
        parameters |= {f"{path}.down": update.down, f"{path}.up": update.up}
    return parameters


def forward_of(module: Any, update: LowRankUpdate) -> Any:
    """The module's forward with its update."""
    frozen = type(module).forward

    def forward(x: Tensor) -> Tensor:
        if not update.active:
            return frozen(module, x)
        if update.dropout and update.training:
            return frozen(module, x) + dropped(module, update, x)
        values = x, module.weight, module.bias, update.down, update.up
        pieces = [None if value is None else cast(value, x) for value in values]
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(module, nn.Linear):
                return LowRankLinear.apply(*pieces, update.scale)
            return LowRankConvolution.apply(*pieces, update.scale, module.stride, module.padding, module.dilation)

    return forward


def cast(value: Tensor, x: Tensor) -> Tensor:
    """In the type that autocast would compute in; without autocast, in that of the input."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return value.to(dtype)


def dropped(module: Any, update: LowRankUpdate, x: Tensor) -> Tensor:
    """The update's part where its input is dropped out, by autograd."""
    x = functional.dropout(x, update.dropout)
    down, up = (cast(factor, x) for factor in (update.down, update.up))
    if isinstance(module, nn.Linear):
        return update.scale * functional.linear(functional.linear(x, down), up)
    inner = functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
    return update.scale * functional.conv2d(inner, up)


class LowRankLinear(torch.autograd.Function):
    """A linear layer and its update, with a frozen weight and bias; rows are flattened once, as each view is a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *values: Any) -> Tensor:
        weight, bias, down, up, scale = values
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.t()
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return y.addmm_(inner, up.t(), alpha=scale).view(*x.shape[:-1], up.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, inner, weight, down, up = ctx.saved_tensors
        grad = grads[0].reshape(-1, up.shape[0])
        grad_inner = scaled(grad @ up, ctx.scale)
        grad_x = (grad @ weight).addmm_(grad_inner, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_inner.t() @ rows, scaled(grad.t() @ inner, ctx.scale), None


def scaled(fresh: Tensor, scale: float) -> Tensor:
    """A tensor of our own times the scale, which is mostly 1."""
    return fresh if scale == 1 else fresh.mul_(scale)


class LowRankConvolution(torch.autograd.Function):
    """A convolution (one group) and its update, with a frozen weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *values: Any) -> Tensor:
        weight, bias, down, up, scale, *geometry = values
        inner = functional.conv2d(x, down, None, *geometry)
        ctx.save_for_backward(x, inner, weight, down, up)
        ctx.scale, ctx.geometry = scale, geometry
        return functional.conv2d(x, weight, bias, *geometry).add_(functional.conv2d(inner, up), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inner, weight, down, up = ctx.saved_tensors
        grad = grads[0]
        grad_inner = ctx.scale * functional.conv_transpose2d(grad, up)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, weight, grad, *ctx.geometry)
            grad_x = grad_x.add_(conv2d_input(x.shape, down, grad_inner, *ctx.geometry))
        grad_down = conv2d_weight(x, down.shape, grad_inner, *ctx.geometry)
        grad_up = ctx.scale * torch.einsum("nohw,nrhw->or", grad, inner)[..., None, None]
        return grad_x, None, None, grad_down, grad_up, None, None, None, None


def update_at(base: Base, path: str) -> LowRankUpdate:
    return getattr(module_at(base, path), NAME)


@contextmanager
def disabled(base: Base) -> Iterator[None]:
    """The frozen base alone while the block runs, bit for bit."""
    found = [
        module
        for component in base.family.components
        for module in getattr(base.pipe, component).modules()
        if isinstance(module, LowRankUpdate)
    ]
    for update in found:
        update.active = False
    try:
        yield
    finally:
        for update in found:
            update.active = True


def layer_factors(base: Base, paths: Iterable[str]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Down, up and scale of each layer."""
    for path in paths:
        update = update_at(base, path)
        yield update.down, update.up, update.scale


def extract(base: Base, paths: Sequence[str], metadata: AdapterMetadata, dtype: torch.dtype) -> Adapter:
    """The injected layers as a value, copied to the CPU in `dtype`."""

    def layer(update: LowRankUpdate) -> LoRALayer:
        down, up = (factor.detach().to("cpu", dtype, copy=True) for factor in (update.down, update.up))
        return LoRALayer(down=down, up=up, alpha=update.alpha)

    return Adapter(layers={path: layer(update_at(base, path)) for path in paths}, metadata=metadata)
