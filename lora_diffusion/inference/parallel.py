"""Apply blends in parallel to the weights: each module adds its deltas to its output, and the weights stay unchanged.

    y = f(x; W) + up (down x)

The factors of all LoRA layers of a module are stacked along the rank, so the number of operations does not grow with
the number of adapters. Each sample of a batch may have its own blend, whose factors are one slice of a batched matrix
product. This makes it possible to run several blends in one forward pass, to limit adapters to regions of the image,
and to apply blends to quantized weights or to half-precision weights, where rounding could lose a small delta.

Deltas are added to the output in place, for speed. The reference that they equal up to rounding is `low_rank_forward`.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.blend import Blend, BlendSum, blend_sum, terms_equal
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.deltas import compute_blended_bias, weighted_deltas
from lora_diffusion.adapters.factor_stack import BiasTerm, Term, split_stackable, stack_factors
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.in_place import full_precision, validate_blend, weight_shape
from lora_diffusion.inference.open_patches import exclusive_patch
from lora_diffusion.models.forward_overrides import Forward, ForwardOverrides
from lora_diffusion.models.load import Base, module_at


@dataclass(frozen=True, kw_only=True)
class ParallelDelta:
    """The delta of a module for each blend of a batch, all tensors in one dtype.

    The first axis of each tensor, of size n, is the blend; n = 1 if all samples of the batch have the same blend.
    """

    down: Tensor | None = field(default=None, repr=False)
    """Stacked LoRA factors (n, sum of ranks, in, *kernel); blends of lower rank are padded with zeros."""
    up: Tensor | None = field(default=None, repr=False)
    """Stacked LoRA factors (n, out, sum of ranks), multiplied by scales and coefficients."""
    dense: Tensor | None = field(default=None, repr=False)
    """Deltas (n, *weight shape) of the layers whose factors cannot be stacked."""
    bias: Tensor | None = field(default=None, repr=False)
    """Deltas of the bias (n, out)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of all tensors."""
        return next(tensor.dtype for tensor in (self.up, self.dense, self.bias) if tensor is not None)

    def to(self, dtype: torch.dtype) -> "ParallelDelta":
        """Return a copy in another dtype."""
        parts = {"down": self.down, "up": self.up, "dense": self.dense, "bias": self.bias}
        return ParallelDelta(**{name: part if part is None else part.to(dtype) for name, part in parts.items()})

    @cached_property
    def shared_factors(self) -> tuple[Tensor, Tensor] | None:
        """Transposed factors, (in, sum of ranks) and (sum of ranks, out), of a linear layer with one blend for all."""
        if self.down is None or self.up is None or self.up.shape[0] > 1 or self.down.ndim > 3:
            return None
        return self.down[0].T, self.up[0].T


class ModuleDelta:
    """A module with its parallel delta, in each dtype that the module's output has had.

    Quantized modules and autocast choose the dtype of the output themselves, so it is known only in the forward pass.
    """

    def __init__(self, module: nn.Module, delta: ParallelDelta) -> None:
        self.module = module
        self._by_dtype = {delta.dtype: delta}
        self._delta = delta

    def add_to(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the delta to the module's output.

        Args:
            x: Input of the module.
            y: Output of the module for `x`; modified in place where possible.

        Returns:
            The output with the delta added, in the dtype of `y`.

        Raises:
            ConfigError: If the batch size is not a multiple of the number of blends.
        """
        if y.dtype not in self._by_dtype:
            self._by_dtype[y.dtype] = self._delta.to(y.dtype)
        delta, x = self._by_dtype[y.dtype], x.to(y.dtype)
        if isinstance(self.module, nn.Linear):
            return _add_to_linear(x, y, delta)
        if isinstance(self.module, nn.Conv2d):
            return _add_to_convolution(self.module, x, y, delta)
        return _add_to_norm(self.module, x, y, delta)

    def wrap(self, original_forward: Forward) -> Forward:
        """Return a forward method that adds the delta to the output of the original one."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.add_to(x, original_forward(x, *args, **kwargs))

        return forward


def build_delta(module: nn.Module, path: str, sums: Sequence[BlendSum]) -> ModuleDelta:
    """Build the parallel delta of a module.

    Args:
        module: Linear layer, 2D convolution, group norm or layer norm.
        path: Module path.
        sums: Deltas of each blend of the batch; at least one must change this module.

    Raises:
        ConfigError: If a DoRA layer is to be applied to a quantized weight.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    terms = [deltas.layers.get(path, ()) for deltas in sums]
    biases = [deltas.biases.get(path, ()) for deltas in sums]
    factors = [_stack_weighted_factors(each, module) for each in terms]
    # `up` is padded along the rank, its last axis, and `_pad_and_stack` pads the first.
    down, up = (
        _pad_and_stack([down for down, _ in factors]),
        _pad_and_stack([None if up is None else up.mT for _, up in factors]),
    )
    dense = _pad_and_stack([_dense_delta(each, module, path) for each in terms])
    bias = _pad_and_stack([_bias_delta(each, module) for each in biases])
    delta = ParallelDelta(
        down=None if down is None else down.to(dtype),
        up=None if up is None else up.mT.contiguous().to(dtype),
        dense=None if dense is None else dense.to(dtype),
        bias=None if bias is None else bias.to(dtype),
    )
    _ = delta.shared_factors  # computed here, so that the first forward pass runs the same operations as later ones
    return ModuleDelta(module, delta)


def _stack_weighted_factors(terms: Sequence[Term], module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Stack (sum of ranks, in, *kernel) and (out, sum of ranks) of plain LoRA layers, up with scales and coefficients.

    Returns None for both if there is no plain LoRA layer.
    """
    stackable = split_stackable(terms)[0]
    if not stackable:
        return None, None
    shape = weight_shape(module)
    assert isinstance(module.weight, Tensor)
    stack = stack_factors([layer for _, layer in stackable], module.weight.device)
    return stack.down.reshape(-1, *shape[1:]), stack.weighted_up(stackable)


def _dense_delta(terms: Sequence[Term], module: nn.Module, path: str) -> Tensor | None:
    """Sum the deltas of the layers whose factors cannot be stacked, in the shape of the weight."""
    layers = split_stackable(terms)[1]
    if not layers:
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.dtype.is_floating_point:
        if any(layer.kind == "DoRA" for _, layer in layers):
            raise ConfigError(
                f"{path}: DoRA needs the base's own weight, which is quantized; load the base with quantize set to none"
            )
        weight = torch.zeros(weight_shape(module), device=weight.device)  # only its shape and device are used
    return torch.stack([delta.reshape(weight.shape) for delta in weighted_deltas(layers, weight)]).sum(0)


def _bias_delta(terms: Sequence[BiasTerm], module: nn.Module) -> Tensor | None:
    if not terms:
        return None
    bias = module.bias
    assert isinstance(bias, Tensor)
    return compute_blended_bias(torch.zeros_like(bias, dtype=torch.float32), terms)


def _pad_and_stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Stack along a new first axis; None and tensors with a shorter first axis are padded with zeros."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    longest = max(tensor.shape[0] for tensor in present)
    result = present[0].new_zeros(len(tensors), longest, *present[0].shape[1:])
    for row, tensor in zip(result, tensors, strict=True):
        if tensor is not None:
            row[: tensor.shape[0]] = tensor
    return result


def _repeat_for_batch(tensor: Tensor, batch: int) -> Tensor:
    """Repeat a tensor along its first axis to the batch size, so that sample i has the slice i modulo n."""
    if batch % tensor.shape[0]:
        raise ConfigError(
            f"cannot apply {tensor.shape[0]} blends to a batch of {batch}; the batch size must be a multiple of the "
            "number of blends"
        )
    return tensor.repeat(batch // tensor.shape[0], *[1] * (tensor.ndim - 1)) if tensor.shape[0] < batch else tensor


def _add_to_linear(x: Tensor, y: Tensor, delta: ParallelDelta) -> Tensor:
    """Add the delta of a linear layer in place; x is (batch, ..., in), y is (batch, ..., out)."""
    batch = x.shape[0]
    if delta.shared_factors:
        down, up = delta.shared_factors
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down, up)
    elif delta.up is not None and delta.down is not None:
        hidden = torch.bmm(_as_tokens(x), _repeat_for_batch(delta.down, batch).mT)
        _as_tokens(y).baddbmm_(hidden, _repeat_for_batch(delta.up, batch).mT)
    if delta.dense is not None:
        _as_tokens(y).baddbmm_(_as_tokens(x), _repeat_for_batch(delta.dense, batch).mT)
    if delta.bias is not None:
        _as_tokens(y).add_(_repeat_for_batch(delta.bias, batch)[:, None])
    return y


def _as_tokens(x: Tensor) -> Tensor:
    """View (batch, ..., width) as (batch, tokens, width)."""
    return x.view(x.shape[0], -1, x.shape[-1])


def _add_to_convolution(module: nn.Conv2d, x: Tensor, y: Tensor, delta: ParallelDelta) -> Tensor:
    """Add the delta of a convolution in place; x is (batch, in, h, w), y is (batch, out, h', w')."""
    batch, out = y.shape[:2]
    flat = y.view(batch, out, -1)
    if delta.up is not None and delta.down is not None:
        hidden = convolve_per_sample(module, x, delta.down)
        flat.baddbmm_(_repeat_for_batch(delta.up, batch), hidden.reshape(batch, delta.down.shape[1], -1))
    if delta.dense is not None:
        flat += convolve_per_sample(module, x, delta.dense).reshape(flat.shape)
    if delta.bias is not None:
        flat += _repeat_for_batch(delta.bias, batch)[:, :, None]
    return y


def convolve_per_sample(module: nn.Conv2d, x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each sample with its own kernels, as one grouped convolution.

    Args:
        module: Convolution whose stride, padding and dilation are used.
        x: Input (batch, in, h, w).
        kernels: Kernels (n, out, in, kh, kw); sample i uses kernels i modulo n.

    Returns:
        Output with batch * out channels in total: (batch, out, h', w') if n = 1, else (1, batch * out, h', w').
    """
    options: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    if kernels.shape[0] == 1:
        return functional.conv2d(x, kernels[0], **options)
    grouped = _repeat_for_batch(kernels, x.shape[0]).flatten(0, 1)
    return functional.conv2d(x.reshape(1, -1, *x.shape[2:]), grouped, groups=x.shape[0], **options)


def _add_to_norm(module: nn.Module, x: Tensor, y: Tensor, delta: ParallelDelta) -> Tensor:
    """Add the delta of a norm: its output is linear in the weight, so the delta multiplies the normalized input."""
    channels = (-1, *[1] * (x.ndim - 2)) if isinstance(module, nn.GroupNorm) else (*[1] * (x.ndim - 2), -1)
    if delta.dense is not None:
        y = y + _normalize(module, x) * _repeat_for_batch(delta.dense, x.shape[0]).reshape(x.shape[0], *channels)
    if delta.bias is not None:
        y = y + _repeat_for_batch(delta.bias, x.shape[0]).reshape(x.shape[0], *channels)
    return y


def _normalize(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    return functional.layer_norm(x, module.normalized_shape, eps=module.eps)


class ParallelPatch:
    """Applies one blend after another in parallel to the weights of a base; opened and undone by `parallel_patch`."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._applied: dict[str, tuple[object, ...]] = {}
        """Terms of each blend of the batch, by module path."""
        self._forwards: dict[str, ForwardOverrides] = {}

    def apply(self, blends: Sequence[Blend], denoising_step: DenoisingStep | None = None) -> None:
        """Replace the current blends.

        Args:
            blends: Blend i applies to the samples i, i + n, i + 2n, ... of each batch, where n is the number of blends;
                a single blend applies to all samples.
            denoising_step: Step to evaluate the blends at, required if one has a schedule.

        Raises:
            FamilyMismatchError: If an adapter does not fit the base.
            AdapterFormatError: If an adapter contains NaN or infinity.
            ConfigError: If a blend needs regions or a step that is not given, or adds DoRA to quantized weights. The
                previous blends stay applied after each of these errors.
        """
        for blend in blends:
            validate_blend(self.base, blend)
        self.write([blend_sum(blend, self.base.layout, denoising_step) for blend in blends])

    def write(self, sums: Sequence[BlendSum]) -> None:
        """Replace the current deltas, without validating the adapters.

        Args:
            sums: Deltas of each blend of the batch, in the order of `apply`.

        Raises:
            ConfigError: If a DoRA layer is to be applied to a quantized weight; the previous deltas stay applied.
        """
        paths = {path for deltas in sums for path in (*deltas.layers, *deltas.biases)}
        terms_by_path = {path: tuple((s.layers.get(path, ()), s.biases.get(path, ())) for s in sums) for path in paths}
        changed = [path for path, terms in terms_by_path.items() if not terms_equal(self._applied.get(path), terms)]
        with full_precision(self.base):
            module_deltas = {path: build_delta(module_at(self.base, path), path, sums) for path in changed}
        for path in [path for path in self._applied if path not in terms_by_path]:
            self._remove(path)
        for path, module_delta in module_deltas.items():
            self._remove(path)
            module = module_delta.module
            self._forwards[path] = ForwardOverrides()
            self._forwards[path].replace(module, module_delta.wrap(module.forward))
            self._applied[path] = terms_by_path[path]

    def _remove(self, path: str) -> None:
        if path in self._forwards:
            self._forwards[path].restore()
            del self._forwards[path]
        self._applied.pop(path, None)

    def undo(self) -> None:
        """Remove all deltas and put back the previous forward methods."""
        for path in tuple(self._forwards):
            self._remove(path)


@contextmanager
def parallel_patch(base: Base) -> Generator[ParallelPatch]:
    """Open a patch that applies blends in parallel to the weights; it is removed when the context exits.

    Raises:
        ConfigError: If a parallel patch is open on this base already.
    """
    conflict = f"{base.name}: a parallel patch is open on this base already; close that patch first"
    with exclusive_patch(base, "parallel", conflict):
        patch = ParallelPatch(base)
        try:
            yield patch
        finally:
            patch.undo()


@contextmanager
def parallel_blend(base: Base, *blends: Blend, denoising_step: DenoisingStep | None = None) -> Generator[ParallelPatch]:
    """Apply blends in parallel to the weights; they are removed when the context exits.

    Args:
        base: Base model.
        *blends: One blend for all samples, or one for each sample of a batch; see `ParallelPatch.apply`.
        denoising_step: Step to evaluate the blends at, required if one has a schedule.

    Raises:
        FamilyMismatchError: If an adapter does not fit the base.
        AdapterFormatError: If an adapter contains NaN or infinity.
        ConfigError: If a parallel patch is open on this base already, or a blend cannot be applied.
    """
    with parallel_patch(base) as patch:
        patch.apply(blends, denoising_step)
        yield patch
