"""A frozen linear layer or convolution and a low-rank update, at nearly the frozen layer's own cost.

    y = W x + b + scale * B (A x)   [arXiv:2106.09685]

Autograd would keep the input twice and make a tensor for each product; here one function has both passes written out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

DOWN = 3
"""Where `down` stands among the arguments of the functions below."""


def forward_with_update(module: Any, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The module's output with `scale * up @ down` added to its weight."""
    values = x, module.weight, module.bias, down, up
    pieces = [None if value is None else cast_for_compute(value, x) for value in values]
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(module, nn.Linear):
            return LowRankLinear.apply(*pieces, scale)
        return LowRankConvolution.apply(*pieces, scale, module.stride, module.padding, module.dilation)


def cast_for_compute(value: Tensor, x: Tensor) -> Tensor:
    """In the type that is computed in."""
    return value.to(compute_dtype(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that autocast would compute in; without autocast, that of the input."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LowRankLinear(torch.autograd.Function):
    """A linear layer and its update, with a frozen weight and bias; rows are flattened once, as each view is a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *values: Any) -> Tensor:
        weight, bias, down, up, scale = values
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ down.t()
        kept = rows if ctx.needs_input_grad[DOWN] else None  # what a frozen `down` saves [LoRA-FA, arXiv:2308.03303]
        ctx.save_for_backward(kept, inner, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return y.addmm_(inner, up.t(), alpha=scale).view(*x.shape[:-1], up.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, inner, weight, down, up = ctx.saved_tensors
        grad = grads[0].reshape(-1, up.shape[0])
        grad_inner = scale_in_place(grad @ up, ctx.scale)
        grad_x = (grad @ weight).addmm_(grad_inner, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_down = None if rows is None else grad_inner.t() @ rows
        return grad_x, None, None, grad_down, scale_in_place(grad.t() @ inner, ctx.scale), None


def scale_in_place(fresh: Tensor, scale: float) -> Tensor:
    """A tensor of our own times the scale, which is mostly 1."""
    return fresh if scale == 1 else fresh.mul_(scale)


class LowRankConvolution(torch.autograd.Function):
    """A convolution (one group) and its update, with a frozen weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *values: Any) -> Tensor:
        weight, bias, down, up, scale, *geometry = values
        inner = functional.conv2d(x, down, None, *geometry)
        kept = x if ctx.needs_input_grad[DOWN] else None
        ctx.save_for_backward(kept, inner, weight, down, up)
        ctx.scale, ctx.geometry, ctx.shape = scale, geometry, x.shape
        return functional.conv2d(x, weight, bias, *geometry).add_(functional.conv2d(inner, up), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, inner, weight, down, up = ctx.saved_tensors
        grad = grads[0]
        grad_inner = ctx.scale * functional.conv_transpose2d(grad, up)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(ctx.shape, weight, grad, *ctx.geometry)
            grad_x = grad_x.add_(conv2d_input(ctx.shape, down, grad_inner, *ctx.geometry))
        grad_down = None if x is None else conv2d_weight(x, down.shape, grad_inner, *ctx.geometry)
        grad_up = ctx.scale * torch.einsum("nohw,nrhw->or", grad, inner)[..., None, None]
        return grad_x, None, None, grad_down, grad_up, None, None, None, None
