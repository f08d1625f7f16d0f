"""Fused forward and backward passes of a frozen linear layer or convolution with a low-rank adapter.

    y = W x + b + scale * up @ (down @ x)   [arXiv:2106.09685]

With plain operations, autograd stores the input twice and allocates a tensor for each product. These two autograd
functions store it once and accumulate in place, so that the adapter costs little more than the frozen layer alone. The
reference that they equal up to rounding is the frozen layer plus `low_rank_forward`.
"""

# torch.autograd.Function and torch.nn.grad are untyped.
# pyright: standard

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

_DOWN_INDEX = 3
"""Position of `down` among the arguments of both autograd functions."""


def forward_with_update(module: Any, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Compute the module's output with `scale * up @ down` added to its weight.

    Args:
        module: A frozen `nn.Linear` or `nn.Conv2d` (one group) with a floating-point weight.
        x: (..., in) for a linear layer, (n, in, h, w) for a convolution.
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
        scale: Multiplier of the product of the factors.
    """
    tensors = x, module.weight, module.bias, down, up
    arguments = [None if tensor is None else cast_for_compute(tensor, x) for tensor in tensors]
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(module, nn.Linear):
            return LowRankLinear.apply(*arguments, scale)
        return LowRankConvolution.apply(*arguments, scale, module.stride, module.padding, module.dilation)


def cast_for_compute(value: Tensor, x: Tensor) -> Tensor:
    """Cast a tensor to the dtype in which a layer with input `x` computes."""
    return value.to(compute_dtype(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype on the device of `x`, or the dtype of `x` if autocast is off."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class LowRankLinear(torch.autograd.Function):
    """A linear layer with a frozen weight and bias and a low-rank adapter.

    The input is flattened to rows once, because every view is a separate call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *values: Any) -> Tensor:
        """Compute the output from (x, weight, bias, down, up, scale)."""
        weight, bias, down, up, scale = values
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ down.t()
        # Only the gradient of `down` needs the input; LoRA-FA freezes it to save this memory [arXiv:2308.03303].
        saved_rows = rows if ctx.needs_input_grad[_DOWN_INDEX] else None
        ctx.save_for_backward(saved_rows, hidden, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return y.addmm_(hidden, up.t(), alpha=scale).view(*x.shape[:-1], up.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Compute the gradients of x, down and up."""
        rows, hidden, weight, down, up = ctx.saved_tensors
        grad = grads[0].reshape(-1, up.shape[0])
        grad_hidden = _scale_in_place(grad @ up, ctx.scale)
        grad_x = (grad @ weight).addmm_(grad_hidden, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_down = None if rows is None else grad_hidden.t() @ rows
        return grad_x, None, None, grad_down, _scale_in_place(grad.t() @ hidden, ctx.scale), None


def _scale_in_place(values: Tensor, scale: float) -> Tensor:
    """Multiply a tensor by the scale in place; skips the call for a scale of 1, the usual one."""
    return values if scale == 1 else values.mul_(scale)


class LowRankConvolution(torch.autograd.Function):
    """A convolution (one group) with a frozen weight and bias and a low-rank adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *values: Any) -> Tensor:
        """Compute the output from (x, weight, bias, down, up, scale, stride, padding, dilation)."""
        weight, bias, down, up, scale, *geometry = values
        hidden = functional.conv2d(x, down, None, *geometry)
        saved_x = x if ctx.needs_input_grad[_DOWN_INDEX] else None
        ctx.save_for_backward(saved_x, hidden, weight, down, up)
        ctx.scale, ctx.geometry, ctx.shape = scale, geometry, x.shape
        return functional.conv2d(x, weight, bias, *geometry).add_(functional.conv2d(hidden, up), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Compute the gradients of x, down and up."""
        x, hidden, weight, down, up = ctx.saved_tensors
        grad = grads[0]
        grad_hidden = ctx.scale * functional.conv_transpose2d(grad, up)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(ctx.shape, weight, grad, *ctx.geometry)
            grad_x = grad_x.add_(conv2d_input(ctx.shape, down, grad_hidden, *ctx.geometry))
        grad_down = None if x is None else conv2d_weight(x, down.shape, grad_hidden, *ctx.geometry)
        grad_up = ctx.scale * torch.einsum("nohw,nrhw->or", grad, hidden)[..., None, None]
        return grad_x, None, None, grad_down, grad_up, None, None, None, None
