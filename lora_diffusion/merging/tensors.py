"""What each tensor of a merged checkpoint becomes: computed in float32, rounded once, and what rounding cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diffusion.adapters.blend import BlendSum
from lora_diffusion.adapters.deltas import check_range, compute_blended_bias, compute_blended_weight
from lora_diffusion.algebra.combine.methods import make_generator
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.merging.layout import OutputTensor, SourceTensor


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseChange:
    """Another checkpoint blended in: weight * (added - taken), where None stands for the base itself."""

    weight: float
    added: Checkpoint
    taken: Checkpoint | None = None


@dataclass(kw_only=True, eq=False)
class MergedTensors:
    """The values of a merge, one tensor at a time, and running sums of what rounding did to them."""

    total: BlendSum
    bases: tuple[BaseChange, ...]
    config: MergeConfig
    appended: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Rows to be put below parameters: the vectors of learned words."""
    error: float = 0.0
    delta: float = 0.0

    def value(self, tensor: OutputTensor) -> Tensor:
        """An output tensor. Raises ConfigError for a value beyond the range of its type."""
        dtype = torch_dtype(tensor.kind[0])
        parts = [self.merge_source(part, dtype) for part in tensor.parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (whole.T.contiguous() if tensor.transposed else whole).reshape(tensor.kind[1])

    def merge_source(self, part: SourceTensor, dtype: torch.dtype) -> Tensor:
        own = part.stored.read()
        exact = self.merge_parameter(part.name, own)
        if exact is None:
            return own.to(dtype)
        value = round_checked(exact, dtype, part.name, self.config)
        self.error += squared_norm(torch.sub(value, exact))
        self.delta += squared_norm(torch.sub(own, exact)) if exact.shape == own.shape else 0.0
        return value

    def merge_parameter(self, name: str, own: Tensor) -> Tensor | None:
        """The merged parameter in float32; None if nothing changes it."""
        path, _, leaf = name.rpartition(".")
        layers = self.total.layers.get(path, ()) if leaf == "weight" else ()
        biases = self.total.biases.get(path, ()) if leaf == "bias" else ()
        if not name or not (self.bases or layers or biases or name in self.appended):
            return None
        value = own.float()
        for change in self.bases:
            taken = own if change.taken is None else change.taken.parameters[name].read()
            value = value + change.weight * (change.added.parameters[name].read().float() - taken.float())
        value = compute_blended_weight(value, layers) if layers else value
        value = compute_blended_bias(value, biases) if biases else value
        return torch.cat([value, self.appended[name].float()]) if name in self.appended else value

    @property
    def rounding_error(self) -> float:
        """Norm of what rounding changed over norm of what the merge changes."""
        return (self.error / self.delta) ** 0.5 if self.delta else 0.0


def squared_norm(tensor: Tensor) -> float:
    """The squared Frobenius norm of a float32 tensor."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


def round_checked(exact: Tensor, dtype: torch.dtype, name: str, config: MergeConfig) -> Tensor:
    """A float32 tensor in the output's type. Raises ConfigError if it does not fit, unless that is allowed."""
    if config.allow_overflow:
        limit = torch.finfo(dtype).max
        exact = exact.clamp(-limit, limit)
    check_range(exact, dtype, name)
    if config.stochastic_seed is None or dtype not in (torch.float16, torch.bfloat16):
        return exact.to(dtype)
    return round_stochastically(exact, dtype, make_generator(config.stochastic_seed, name))


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Stochastic rounding: one of the two 16-bit neighbors, the nearer one more likely, so that the mean is exact."""
    nearest = exact.to(dtype)
    error = exact - nearest.float()
    bits = nearest.view(torch.int16)
    away = torch.where(bits < 0, error < 0, error > 0)  # whether the other neighbor is larger in magnitude
    stepped = bits + torch.where(away, 1, -1).to(torch.int16)
    smallest = torch.where(error < 0, -32767, 1).to(torch.int16)
    other = torch.where(nearest == 0, smallest, stepped).view(dtype)
    chance = error.abs() / (other.float() - nearest.float()).abs()
    take = torch.rand(exact.shape, generator=generator) < chance
    return torch.where(take & other.isfinite(), other, nearest)
