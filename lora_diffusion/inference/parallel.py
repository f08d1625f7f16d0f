"""Blends beside the weights: one parallel branch per module, for all adapters together, the weights untouched.

    y = f(x; W) + up (down x)

Factors are stacked, so the branch costs the same few operations however many adapters it holds. Each sample of a batch
may have a blend of its own (its factors are one slice of a batched product), which serves several blends in one pass,
regional masks, bases with quantized weights, and half-precision bases whose rounding would swallow a delta.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.blend import Blend, BlendSum, blend_sum, terms_equal
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.deltas import compute_blended_bias, weighted_deltas
from lora_diffusion.adapters.factor_stack import BiasTerm, Term, split_stackable, stack_factors
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.in_place import full_precision, validate_blend, weight_shape
from lora_diffusion.models.load import Base, module_at

Sums = Sequence[BlendSum]
Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class ParallelDelta:
    """What a module adds to its output, in the activations' type; the first axis is the sample, or 1 for all alike."""

    down: Tensor | None = None
    """(n, sum of ranks, in, ...kernel); blends of fewer ranks are filled up with zeros."""
    up: Tensor | None = None
    """(n, out, sum of ranks)."""
    dense: Tensor | None = None
    """(n, *weight): deltas of the kinds whose factors cannot be stacked."""
    bias: Tensor | None = None
    """(n, out)."""

    def cast_to(self, y: Tensor) -> "ParallelDelta":
        """The side in the type of the output, which quantized modules and autocast choose for themselves."""
        found = next(tensor for tensor in (self.up, self.dense, self.bias) if tensor is not None)
        if found.dtype == y.dtype:
            return self
        if y.dtype not in self.cached_casts:
            parts = {name: getattr(self, name) for name in ("down", "up", "dense", "bias")}
            cast = {name: part if part is None else part.to(y.dtype) for name, part in parts.items()}
            self.cached_casts[y.dtype] = ParallelDelta(**cast)
        return self.cached_casts[y.dtype]

    @cached_property
    def cached_casts(self) -> "dict[torch.dtype, ParallelDelta]":
        """The same in other types, as they were asked for."""
        return {}

    @cached_property
    def shared_factors(self) -> tuple[Tensor, Tensor] | None:
        """(in, sum of ranks) and (sum of ranks, out) of a linear module, if all samples have the same blend."""
        if self.down is None or self.up is None or self.up.shape[0] > 1 or self.down.ndim > 3:
            return None
        return self.down[0].T, self.up[0].T


def build_delta(module: nn.Module, path: str, sums: Sums) -> ParallelDelta:
    weight = module.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    terms = [total.layers.get(path, ()) for total in sums]
    biases = [total.biases.get(path, ()) for total in sums]
    pairs = [stack_weighted_factors(found, module) for found in terms]
    down, up = (
        pad_and_stack([down for down, _ in pairs]),
        pad_and_stack([None if up is None else up.mT for _, up in pairs]),
    )
    dense = pad_and_stack([dense_delta(found, module, path) for found in terms])
    bias = pad_and_stack([bias_delta(found, module) for found in biases])
    side = ParallelDelta(
        down=None if down is None else down.to(dtype),
        up=None if up is None else up.mT.contiguous().to(dtype),
        dense=None if dense is None else dense.to(dtype),
        bias=None if bias is None else bias.to(dtype),
    )
    _ = side.shared_factors  # now, so that the first forward is like all others
    return side


def stack_weighted_factors(terms: Sequence[Term], module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """(sum of ranks, in, ...kernel) and (out, sum of ranks) with weights and scales in it; None without plain LoRA."""
    joinable = split_stackable(terms)[0]
    if not joinable:
        return None, None
    shape = weight_shape(module)
    assert isinstance(module.weight, Tensor)
    stack = stack_factors([layer for _, layer in joinable], module.weight.device)
    return stack.down.reshape(-1, *shape[1:]), stack.weighted_up(joinable)


def dense_delta(terms: Sequence[Term], module: nn.Module, path: str) -> Tensor | None:
    others = split_stackable(terms)[1]
    if not others:
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.dtype.is_floating_point:
        if any(layer.kind == "DoRA" for _, layer in others):
            raise ConfigError(f"{path}: DoRA needs the base's own weight, which is quantized; set quantize to none")
        weight = torch.zeros(weight_shape(module), device=weight.device)  # only its shape and device are looked at
    return torch.stack([delta.reshape(weight.shape) for delta in weighted_deltas(others, weight)]).sum(0)


def bias_delta(terms: Sequence[BiasTerm], module: nn.Module) -> Tensor | None:
    if not terms:
        return None
    bias = module.bias
    assert isinstance(bias, Tensor)
    return compute_blended_bias(torch.zeros_like(bias, dtype=torch.float32), terms)


def pad_and_stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Stacked along a new first axis; what is missing, or shorter along its own first axis, is filled with zeros."""
    found = [tensor for tensor in tensors if tensor is not None]
    if not found:
        return None
    longest = max(tensor.shape[0] for tensor in found)
    result = found[0].new_zeros(len(tensors), longest, *found[0].shape[1:])
    for row, tensor in zip(result, tensors, strict=True):
        if tensor is not None:
            row[: tensor.shape[0]] = tensor
    return result


def wrap_forward(module: nn.Module, own: Forward, side: ParallelDelta) -> Forward:
    """The module's forward with the side added to its output."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return add_delta(module, x, own(x, *args, **kwargs), side)

    return forward


def add_delta(module: nn.Module, x: Tensor, y: Tensor, side: ParallelDelta) -> Tensor:
    """The module's output y for x with the side added, in y's own memory where that can be done."""
    side, x = side.cast_to(y), x.to(y.dtype)
    if isinstance(module, nn.Linear):
        return add_to_linear(module, x, y, side)
    return (add_to_convolution if isinstance(module, nn.Conv2d) else add_to_norm)(module, x, y, side)


def repeat_for_batch(tensor: Tensor, batch: int) -> Tensor:
    """The samples' slices for a batch that holds every blend the same number of times, one after another."""
    if batch % tensor.shape[0]:
        raise ConfigError(f"{tensor.shape[0]} blends for a batch of {batch}; expected a multiple")
    return tensor.repeat(batch // tensor.shape[0], *[1] * (tensor.ndim - 1)) if tensor.shape[0] < batch else tensor


def add_to_linear(_module: nn.Module, x: Tensor, y: Tensor, side: ParallelDelta) -> Tensor:
    """x (n, ..., in), y (n, ..., out)."""
    if side.shared_factors:
        down, up = side.shared_factors
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down, up)
    elif side.up is not None and side.down is not None:
        hidden = torch.bmm(as_tokens(x), repeat_for_batch(side.down, x.shape[0]).mT)
        as_tokens(y).baddbmm_(hidden, repeat_for_batch(side.up, x.shape[0]).mT)
    if side.dense is not None:
        as_tokens(y).baddbmm_(as_tokens(x), repeat_for_batch(side.dense, x.shape[0]).mT)
    if side.bias is not None:
        as_tokens(y).add_(repeat_for_batch(side.bias, x.shape[0])[:, None])
    return y


def as_tokens(x: Tensor) -> Tensor:
    """(n, tokens, width)."""
    return x.view(x.shape[0], -1, x.shape[-1])


def add_to_convolution(module: nn.Module, x: Tensor, y: Tensor, side: ParallelDelta) -> Tensor:
    """x (n, in, h, w), y (n, out, h', w'). Each sample is a group of one convolution."""
    assert isinstance(module, nn.Conv2d)
    batch, out = y.shape[:2]
    flat = y.view(batch, out, -1)
    if side.up is not None and side.down is not None:
        hidden = convolve_per_sample(module, x, side.down)
        flat.baddbmm_(repeat_for_batch(side.up, batch), hidden.reshape(batch, side.down.shape[1], -1))
    if side.dense is not None:
        flat += convolve_per_sample(module, x, side.dense).reshape(flat.shape)
    if side.bias is not None:
        flat += repeat_for_batch(side.bias, batch)[:, :, None]
    return y


def convolve_per_sample(module: nn.Conv2d, x: Tensor, kernels: Tensor) -> Tensor:
    """Every sample convolved with its own kernels (n, out, in, kh, kw), or all with the only ones."""
    how: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    if kernels.shape[0] == 1:
        return functional.conv2d(x, kernels[0], **how)
    own = repeat_for_batch(kernels, x.shape[0]).flatten(0, 1)
    return functional.conv2d(x.reshape(1, -1, *x.shape[2:]), own, groups=x.shape[0], **how)


def add_to_norm(module: nn.Module, x: Tensor, y: Tensor, side: ParallelDelta) -> Tensor:
    """A norm's output is linear in its weight: what the delta adds is the normalized input times the delta."""
    channels = (-1, *[1] * (x.ndim - 2)) if isinstance(module, nn.GroupNorm) else (*[1] * (x.ndim - 2), -1)
    if side.dense is not None:
        y = y + normalize(module, x) * repeat_for_batch(side.dense, x.shape[0]).reshape(x.shape[0], *channels)
    if side.bias is not None:
        y = y + repeat_for_batch(side.bias, x.shape[0]).reshape(x.shape[0], *channels)
    return y


def normalize(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    return functional.layer_norm(x, module.normalized_shape, eps=module.eps)


class ForwardOverrides:
    """Forwards that stand in for modules' own, and what stood there before, such as another tool's hook."""

    def __init__(self) -> None:
        self.replaced: list[tuple[nn.Module, Forward | None]] = []

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """Give a module another forward until `restore`."""
        self.replaced.append((module, vars(module).get("forward")))
        module.forward = forward  # type: ignore[method-assign]

    def restore(self) -> None:
        """Give every module back what it had, the last replaced first."""
        while self.replaced:
            module, own = self.replaced[-1]
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own  # type: ignore[method-assign]
            self.replaced.pop()


BRANCHED: WeakSet[Base] = WeakSet()
"""Bases that have a branch open at this denoising_step."""


class ParallelPatch:
    """A base whose modules add parallel deltas to their outputs; `parallel_patch` opens one and removes it."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.applied: dict[str, tuple[object, ...]] = {}
        self.forwards: dict[str, ForwardOverrides] = {}

    def apply(self, blends: Sequence[Blend], denoising_step: DenoisingStep | None = None) -> None:
        """Give sample i of every batch the blend i, counted modulo their number; one blend is everybody's.

        Raises FamilyMismatchError, AdapterFormatError and ConfigError before anything changes.
        """
        for blend in blends:
            validate_blend(self.base, blend)
        self.write([blend_sum(blend, self.base.layout, denoising_step) for blend in blends])

    def write(self, sums: Sums) -> None:
        """The same from the terms of each sample."""
        paths = {path for total in sums for path in (*total.layers, *total.biases)}
        wanted = {path: tuple((t.layers.get(path, ()), t.biases.get(path, ())) for t in sums) for path in paths}
        changed = [path for path, terms in wanted.items() if not terms_equal(self.applied.get(path), terms)]
        with full_precision(self.base):
            sides = {path: build_delta(module_at(self.base, path), path, sums) for path in changed}
        for path in [path for path in self.applied if path not in wanted]:
            self.remove(path)
        for path, side in sides.items():
            self.remove(path)
            module = module_at(self.base, path)
            self.forwards[path] = ForwardOverrides()
            self.forwards[path].replace(module, wrap_forward(module, module.forward, side))
            self.applied[path] = wanted[path]

    def remove(self, path: str) -> None:
        if path in self.forwards:
            self.forwards[path].restore()
            del self.forwards[path]
        self.applied.pop(path, None)

    def undo(self) -> None:
        """Take every branch away."""
        for path in tuple(self.forwards):
            self.remove(path)


@contextmanager
def parallel_patch(base: Base) -> Iterator[ParallelPatch]:
    """A branch beside the base's modules, gone afterwards, whatever happens inside. The weights are never touched.

    Raises ConfigError if the base has a branch already.
    """
    if base in BRANCHED:
        raise ConfigError(f"{base.name} has a branch beside its weights already; leave that one first")
    branch = ParallelPatch(base)
    BRANCHED.add(base)
    try:
        yield branch
    finally:
        try:
            branch.undo()
        finally:
            BRANCHED.discard(base)


@contextmanager
def parallel_blend(base: Base, *blends: Blend, denoising_step: DenoisingStep | None = None) -> Iterator[ParallelPatch]:
    """The base with a blend beside its weights, or with one blend for each sample of a batch.

    Raises as `ParallelPatch.apply` does.
    """
    with parallel_patch(base) as branch:
        branch.apply(blends, denoising_step)
        yield branch
