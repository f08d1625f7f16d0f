"""Trainable layers that materialize their delta: LoHa, LoKr, full weight differences, and DoRA around any of them.

The delta is computed in float32. If the layer computes in half precision, the delta is applied separately from the
frozen weight, because adding it to the weight would round small deltas away; it is then recomputed in the backward pass
instead of stored.
"""

# torch.utils.checkpoint is untyped.
# pyright: standard

from abc import abstractmethod
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.layers import FLOAT32_EPSILON, DoRALayer, FullLayer, Layer, LoHaLayer, LoKrLayer, LowRank
from lora_diffusion.training.methods.base import (
    AdapterSize,
    AdditiveLayer,
    BaseForward,
    TrainableLayer,
    kaiming_uniform,
    make_parameter,
)
from lora_diffusion.training.methods.fused_ops import cast_for_compute, compute_dtype

_LOHA_W1_A_STD = 0.1
"""Standard deviation of the initial `w1_a`, as in LyCORIS [github.com/KohakuBlueleaf/LyCORIS]."""


def _functional_forward(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer or convolution like `module`, with another weight and bias.

    Args:
        module: Gives the type and, for a convolution, stride, padding and dilation.
        x: Input of the module.
        weight: Weight with the shape of the module's own.
        bias: Bias (out,), or None for none.
    """
    x, weight, bias = (
        cast_for_compute(x, x),
        cast_for_compute(weight, x),
        None if bias is None else cast_for_compute(bias, x),
    )
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(module, nn.Linear):
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)


class TrainableFullLayer(AdditiveLayer):
    """A trained difference for each value of a module's weight and bias, initially zero.

    Supports linear layers, convolutions, group norms and layer norms.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.diff = make_parameter(torch.zeros_like(module.weight, dtype=torch.float32), module)
        self.bias_diff = None if module.bias is None else make_parameter(torch.zeros_like(module.bias), module)

    def output(self, module: Any, x: Tensor, base_forward: BaseForward) -> Tensor:
        """Compute the adapted output; norms are computed from the sums of weights and differences."""
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            return self._forward_norm(module, x)
        return super().output(module, x, base_forward)

    def _forward_norm(self, module: Any, x: Tensor) -> Tensor:
        """Compute a norm in float32, because sums in half precision would round small differences away."""
        weight = module.weight.float() + self.diff
        bias = None if self.bias_diff is None else module.bias.float() + self.bias_diff
        if isinstance(module, nn.GroupNorm):
            y = functional.group_norm(x.float(), module.num_groups, weight, bias, module.eps)
        else:
            y = functional.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        """Apply the differences of weight and bias to the input."""
        return _functional_forward(module, x, self.diff, self.bias_diff)

    def bias(self) -> Tensor | None:
        """Return the difference of the bias."""
        return self.bias_diff

    def layer(self) -> FullLayer:
        """Return the difference of the weight."""
        return FullLayer(diff=self.diff)


class DenseDeltaLayer(AdditiveLayer):
    """A trainable layer whose delta is computed by the layer that it is saved as."""

    @abstractmethod
    def layer(self) -> LowRank:
        """Return the layer to save, whose `delta` is the trained one."""

    def output(self, module: Any, x: Tensor, base_forward: BaseForward) -> Tensor:
        """Compute the adapted output; in float32 with the delta added to the weight, which needs one product less."""
        if compute_dtype(x) != torch.float32:
            return super().output(module, x, base_forward)
        return _functional_forward(
            module, x, module.weight + self.layer().delta().reshape(module.weight.shape), module.bias
        )

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        """Apply the delta to the input; the backward pass recomputes the delta."""
        with torch.autocast(x.device.type, enabled=False):
            delta = checkpoint(lambda: self.layer().delta(), use_reentrant=False, preserve_rng_state=False)
        return _functional_forward(module, x, delta.reshape(module.weight.shape))


class TrainableLoHa(DenseDeltaLayer):
    """LoHa [arXiv:2108.06098]: the Hadamard product of two low-rank matrices, which has a rank of up to r * r.

    delta = scale * (w1_a @ w1_b) * (w2_a @ w2_b)
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__()
        rank, out, inputs = size.rank, module.weight.shape[0], module.weight[0].numel()
        self.w1_a = make_parameter(torch.randn(out, rank, generator=generator) * _LOHA_W1_A_STD, module)
        self.w1_b = make_parameter(torch.randn(rank, inputs, generator=generator), module)
        self.w2_a = make_parameter(torch.zeros(out, rank), module)
        self.w2_b = make_parameter(torch.randn(rank, inputs, generator=generator), module)
        self.alpha = size.scale * rank

    def layer(self) -> LoHaLayer:
        """Return the four factors."""
        return LoHaLayer(w1_a=self.w1_a, w1_b=self.w1_b, w2_a=self.w2_a, w2_b=self.w2_b, alpha=self.alpha)


class TrainableLoKr(DenseDeltaLayer):
    """LoKr [arXiv:2309.14859]: the Kronecker product of a small matrix w1 and a larger matrix w2.

    The larger matrix is the low-rank product w2_a @ w2_b, or a full matrix where the factors would have at least as
    many parameters. The sides of w1 are the largest divisors of the weight's sides up to `decompose_factor`.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__()
        shape, max_side = module.weight.shape, size.config.decompose_factor
        small_out, small_in = _largest_divisor(shape[0], max_side), _largest_divisor(shape[1], max_side)
        out, inputs, kernel = shape[0] // small_out, shape[1] // small_in, tuple(shape[2:])
        flat, rank = inputs * prod(kernel), size.rank
        self.w1 = make_parameter(kaiming_uniform((small_out, small_in), generator), module)
        self.w2 = self.w2_a = self.w2_b = None
        self.kernel_inputs, self.scale, self.rank = (inputs, *kernel), size.scale, rank
        if rank * (out + flat) < out * flat:
            self.w2_a = make_parameter(kaiming_uniform((out, rank), generator), module)
            self.w2_b = make_parameter(torch.zeros(rank, flat), module)
        else:
            self.w2 = make_parameter(torch.zeros(out, *self.kernel_inputs), module)

    def layer(self) -> LoKrLayer:
        """Return w1 and w2, or the factors of w2."""
        alpha = self.scale * (self.rank if self.w2 is None else 1)
        return LoKrLayer(alpha=alpha, w1=self.w1, w2=self.w2, w2_a=self.w2_a, w2_b=self.w2_b)


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number up to a limit."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


class TrainableDoRA(TrainableLayer):
    """DoRA [arXiv:2402.09353]: a trained magnitude (out, 1[, 1, 1]) for each output, and its direction.

        W' = magnitude * V / norm(V),  V = W + delta

    The norm is a constant in the backward pass, as in section 4.3 of the paper. The delta is that of the inner layer.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, inner: AdditiveLayer) -> None:
        super().__init__()
        self.inner = inner
        self.magnitude = make_parameter(_output_norms(module.weight.detach().float()), module)

    def output(self, module: Any, x: Tensor, base_forward: BaseForward) -> Tensor:
        """Compute W x + bias + (ratio - 1) W x + ratio * delta x, with ratio = magnitude / norm(V).

        The difference ratio - 1 is computed in float32, because a ratio near 1 would round to 1 in half precision.
        """
        y = base_forward(module, x)
        without_bias = (
            y if module.bias is None else y - _broadcast_over_outputs(cast_for_compute(module.bias, x), module)
        )
        ratio = (self.magnitude / self._compute_norms(module)).flatten()
        ratio_minus_one, ratio = (
            _broadcast_over_outputs(cast_for_compute(each, x), module) for each in (ratio - 1, ratio)
        )
        return y + (ratio_minus_one * without_bias + ratio * self.inner.forward_delta(module, x))

    @torch.no_grad()
    def _compute_norms(self, module: Any) -> Tensor:
        """Compute norm(V) for each output."""
        inner: Any = self.inner.layer()
        with torch.autocast(module.weight.device.type, enabled=False):
            return _output_norms(module.weight.float() + inner.delta().reshape(module.weight.shape))

    def layer(self) -> Layer:
        """Return the inner layer with the magnitudes."""
        inner: Any = self.inner.layer()
        return DoRALayer(inner=inner, magnitude=self.magnitude)


def _broadcast_over_outputs(values: Tensor, module: Any) -> Tensor:
    """Reshape values (out,) so that they broadcast with the output of a linear layer or convolution."""
    return values if isinstance(module, nn.Linear) else values[:, None, None]


def _output_norms(weight: Tensor) -> Tensor:
    """Compute the norm of the weights of each output, (out, 1[, 1, 1]), bounded away from zero."""
    squares = weight.square().sum(dim=tuple(range(1, weight.ndim)), keepdim=True)
    return squares.sqrt().clamp(min=FLOAT32_EPSILON)
