"""Updates that make a whole delta of their factors: LoHa, LoKr, full differences, and DoRA around any.

The delta is computed in float32. In half precision it acts beside the frozen weight, as a sum of the two would round
small deltas away, and what it is made of is computed again on the way back, and not kept.
"""

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
    Frozen,
    TrainableLayer,
    kaiming_uniform,
    make_parameter,
)
from lora_diffusion.training.methods.fused_ops import cast_for_compute, compute_dtype

LOHA_SMALL = 0.1
"""Spread of the first half's outer factor [github.com/KohakuBlueleaf/LyCORIS]."""


def functional_forward(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer or convolution of the module's geometry with other values."""
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
    """A difference for every value of a module, weight and bias."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.diff = make_parameter(torch.zeros_like(module.weight, dtype=torch.float32), module)
        self.bias_diff = None if module.bias is None else make_parameter(torch.zeros_like(module.bias), module)

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            return self.forward_norm(module, x)
        return super().output(module, x, frozen)

    def forward_norm(self, module: Any, x: Tensor) -> Tensor:
        """A norm with both of its values, in float32, as a sum in half precision rounds small differences away."""
        weight = module.weight.float() + self.diff
        bias = None if self.bias_diff is None else module.bias.float() + self.bias_diff
        if isinstance(module, nn.GroupNorm):
            y = functional.group_norm(x.float(), module.num_groups, weight, bias, module.eps)
        else:
            y = functional.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        return functional_forward(module, x, self.diff, self.bias_diff)

    def bias(self) -> Tensor | None:
        return self.bias_diff

    def layer(self) -> FullLayer:
        return FullLayer(diff=self.diff)


class DenseDeltaLayer(AdditiveLayer):
    """A delta of factors, in the way of the layer that it is saved as."""

    @abstractmethod
    def layer(self) -> LowRank: ...

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        if compute_dtype(x) != torch.float32:
            return super().output(module, x, frozen)
        return functional_forward(
            module, x, module.weight + self.layer().delta().reshape(module.weight.shape), module.bias
        )

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            delta = checkpoint(lambda: self.layer().delta(), use_reentrant=False, preserve_rng_state=False)
        return functional_forward(module, x, delta.reshape(module.weight.shape))


class TrainableLoHa(DenseDeltaLayer):
    """LoHa: the product, number by number, of two low-rank matrices, of rank r * r [arXiv:2108.06098]."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__()
        rank, out, inputs = size.rank, module.weight.shape[0], module.weight[0].numel()
        self.w1_a = make_parameter(torch.randn(out, rank, generator=generator) * LOHA_SMALL, module)
        self.w1_b = make_parameter(torch.randn(rank, inputs, generator=generator), module)
        self.w2_a = make_parameter(torch.zeros(out, rank), module)
        self.w2_b = make_parameter(torch.randn(rank, inputs, generator=generator), module)
        self.alpha = size.scale * rank

    def layer(self) -> LoHaLayer:
        return LoHaLayer(w1_a=self.w1_a, w1_b=self.w1_b, w2_a=self.w2_a, w2_b=self.w2_b, alpha=self.alpha)


class TrainableLoKr(DenseDeltaLayer):
    """LoKr: the Kronecker product of a small matrix and a larger low-rank one [arXiv:2309.14859].

    The larger one is whole where its low-rank factors would hold as many numbers.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__()
        shape, most = module.weight.shape, size.config.lokr_factor
        small_out, small_in = largest_divisor(shape[0], most), largest_divisor(shape[1], most)
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
        alpha = self.scale * (self.rank if self.w2 is None else 1)
        return LoKrLayer(alpha=alpha, w1=self.w1, w2=self.w2, w2_a=self.w2_a, w2_b=self.w2_b)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return max(each for each in range(1, most + 1) if number % each == 0)


class TrainableDoRA(TrainableLayer):
    """DoRA: magnitude and direction of each output apart [arXiv:2402.09353].

        W' = magnitude * V / norm(V),  V = W + delta

    The norm is taken as a constant in the backward pass, as section 4.3 of the paper has it.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, inner: AdditiveLayer) -> None:
        super().__init__()
        self.inner = inner
        self.magnitude = make_parameter(output_norms(module.weight.detach().float()), module)

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        """W x + bias + (share - 1) W x + share * delta x, as a share of nearly 1 would round to 1."""
        y = frozen(module, x)
        bare = y if module.bias is None else y - broadcast_over_outputs(cast_for_compute(module.bias, x), module)
        share = (self.magnitude / self.compute_norms(module)).flatten()
        less, more = (broadcast_over_outputs(cast_for_compute(each, x), module) for each in (share - 1, share))
        return y + (less * bare + more * self.inner.forward_delta(module, x))

    @torch.no_grad()
    def compute_norms(self, module: Any) -> Tensor:
        """The norms of V."""
        inner: Any = self.inner.layer()
        with torch.autocast(module.weight.device.type, enabled=False):
            return output_norms(module.weight.float() + inner.delta().reshape(module.weight.shape))

    def layer(self) -> Layer:
        inner: Any = self.inner.layer()
        return DoRALayer(inner=inner, magnitude=self.magnitude)


def broadcast_over_outputs(values: Tensor, module: Any) -> Tensor:
    """A value for each output (out,), to be multiplied with a linear layer's outputs or a convolution's."""
    return values if isinstance(module, nn.Linear) else values[:, None, None]


def output_norms(weight: Tensor) -> Tensor:
    """Of each output's weights, (out, 1[, 1, 1])."""
    squares = weight.square().sum(dim=tuple(range(1, weight.ndim)), keepdim=True)
    return squares.sqrt().clamp(min=FLOAT32_EPSILON)
