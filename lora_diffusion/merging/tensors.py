"""Compute the tensors of a merged checkpoint in float32, round them once, and measure the rounding error."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, linalg

from lora_diffusion.adapters.blend import BlendSum
from lora_diffusion.adapters.deltas import check_range, compute_blended_bias, compute_blended_weight
from lora_diffusion.algebra.metrics.rounding_error import rounding_error
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.core.seeding import make_generator
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.merging.layout import OutputTensor, SourceTensor


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseChange:
    """A weighted difference of checkpoints, weight * (added - taken), that is added to the base."""

    weight: float
    added: Checkpoint
    """Checkpoint that is added."""
    taken: Checkpoint | None = None
    """Checkpoint that is subtracted; None for the base itself."""


@dataclass(kw_only=True, eq=False)
class MergedTensors:
    """Computes the tensors of a merge one at a time, and accumulates their rounding error."""

    deltas: BlendSum
    """Sum of the adapters' deltas."""
    bases: tuple[BaseChange, ...]
    """Other checkpoints to merge."""
    config: MergeConfig
    appended: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    """Textual-inversion vectors to append as rows, by the name of the token-embedding parameter."""
    error_norms: list[float] = field(default_factory=list[float])
    """Frobenius norm of the rounding error of each parameter computed so far."""
    delta_norms: list[float] = field(default_factory=list[float])
    """Frobenius norm of the change of each parameter computed so far."""

    def value(self, tensor: OutputTensor) -> Tensor:
        """Compute an output tensor in its output type and shape.

        Raises:
            ConfigError: If a value exceeds the range of the type.
        """
        dtype = torch_dtype(tensor.kind[0])
        parts = [self._merge_source(part, dtype) for part in tensor.parts]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (joined.T.contiguous() if tensor.transposed else joined).reshape(tensor.kind[1])

    def _merge_source(self, part: SourceTensor, dtype: torch.dtype) -> Tensor:
        original = part.stored.read()
        exact = self._merge_parameter(part.name, original)
        if exact is None:
            return original.to(dtype)
        value = _round_checked(exact, dtype, part.name, self.config)
        self.error_norms.append(_norm(torch.sub(value, exact)))
        if exact.shape == original.shape:
            self.delta_norms.append(_norm(torch.sub(original, exact)))
        return value

    def _merge_parameter(self, name: str, original: Tensor) -> Tensor | None:
        """Compute a merged parameter in float32; None if the merge does not change it."""
        path, _, leaf = name.rpartition(".")
        layers = self.deltas.layers.get(path, ()) if leaf == "weight" else ()
        biases = self.deltas.biases.get(path, ()) if leaf == "bias" else ()
        if not name or not (self.bases or layers or biases or name in self.appended):
            return None
        value = original.float()
        for change in self.bases:
            taken = original if change.taken is None else change.taken.parameters[name].read()
            value = value + change.weight * (change.added.parameters[name].read().float() - taken.float())
        value = compute_blended_weight(value, layers) if layers else value
        value = compute_blended_bias(value, biases) if biases else value
        return torch.cat([value, self.appended[name].float()]) if name in self.appended else value

    @property
    def rounding_error(self) -> float:
        """Rounding error of the tensors computed so far, relative to the merged delta."""
        return rounding_error(self.error_norms, self.delta_norms)


def _norm(tensor: Tensor) -> float:
    """Return the Frobenius norm of a float32 tensor, accumulated in float32."""
    return float(cast(Any, linalg).vector_norm(tensor))


def _round_checked(exact: Tensor, dtype: torch.dtype, name: str, config: MergeConfig) -> Tensor:
    """Round a float32 tensor to the output type; with `allow_overflow`, values beyond its range are clamped.

    Raises:
        ConfigError: If a value exceeds the range of the type and `allow_overflow` is off.
    """
    if config.allow_overflow:
        limit = torch.finfo(dtype).max
        exact = exact.clamp(-limit, limit)
    check_range(exact, dtype, name)
    if config.stochastic_seed is None or dtype not in (torch.float16, torch.bfloat16):
        return exact.to(dtype)
    return _round_stochastically(exact, dtype, make_generator(config.stochastic_seed, name))


def _round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 values stochastically to a 16-bit type.

    Each value is rounded to one of its two neighbors, with a probability that makes the expected result exact.

    Args:
        exact: Finite float32 values within the range of `dtype`.
        dtype: float16 or bfloat16.
        generator: CPU generator of the random numbers.
    """
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    bits = nearest.view(torch.int16)
    away = torch.where(bits < 0, error < 0, error > 0)  # whether the other neighbor is larger in magnitude
    stepped = bits + torch.where(away, 1, -1).to(torch.int16)
    smallest = torch.where(error < 0, -32767, 1).to(torch.int16)
    other = torch.where(nearest == 0, smallest, stepped).view(dtype)
    probability = error.abs() / (other.float() - nearest.float()).abs()
    take_other = torch.rand(exact.shape, generator=generator) < probability
    return torch.where(take_other & other.isfinite(), other, nearest)
