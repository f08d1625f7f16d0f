"""The layer kinds of an adapter: LoRA (and LoCon), LoHa, LoKr, DoRA and full differences.

A layer holds the tensors that update the weight of one module, and computes its delta in float32 at blend weight 1. All
kinds but DoRA are linear: their delta does not depend on the weight of the base. The formulas follow the papers and the
implementations that write the files [github.com/KohakuBlueleaf/LyCORIS, github.com/huggingface/peft].
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias, TypeVar

from lora_diffusion.adapters.low_rank_products import (
    is_one_or_pair,
    kronecker_factor,
    kronecker_factor_shape,
    low_rank_product,
    tucker_product,
)
from lora_diffusion.core.dtypes import dtype_name
from lora_diffusion.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", bound="LowRank")
FLOAT32_EPSILON = 2.0**-23
"""Machine epsilon of float32, the lower bound of the norm that DoRA divides by."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Layer(ABC):
    """Base class of all layer kinds: an update of the weight of one module."""

    kind: ClassVar[str]
    """Name of the kind in messages and hashes, such as `LoRA`."""

    def __repr__(self) -> str:
        """Describe the layer on one line: rank and alpha if it has them, sizes and dtype."""
        return f"{type(self).__name__}({', '.join(_describe(self))})"

    @property
    def factors(self) -> dict[str, Tensor]:
        """Tensors of the layer by field name, in a fixed order."""
        values = ((name, getattr(self, name)) for name in _factor_names(type(self)))
        return {name: value for name, value in values if value is not None}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Return a copy of the layer with some of its tensors replaced."""
        return replace(self, **factors)

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer updates, as far as its tensors show it.

        LoHa and LoKr layers of a convolution may hold the kernel flattened; their shape is then (out, in * kh * kw).
        """

    @abstractmethod
    def delta(self, base: Tensor | None = None) -> Tensor:
        """Compute the update of the weight.

        Args:
            base: Weight of the base model, of shape `weight_shape`. Only DoRA uses it, and requires it.

        Returns:
            Tensor of shape `weight_shape` in float32, for a blend weight of 1.

        Raises:
            AdapterFormatError: For a DoRA layer without `base`.
        """


def _describe(layer: Layer) -> Iterator[str]:
    """Iterate over the parts of a layer's repr, such as `rank=8` and `in=320`."""
    if isinstance(layer, DoRALayer):
        yield f"inner={layer.inner.kind}"
    if isinstance(layer, LowRank | DoRALayer):
        yield from (f"rank={layer.rank}", f"alpha={layer.alpha}")
    shape = layer.weight_shape
    yield from (f"in={shape[1]}", f"out={shape[0]}") if len(shape) > 1 else (f"size={math.prod(shape)}",)
    if len(shape) > 2:
        yield f"kernel={'x'.join(map(str, shape[2:]))}"
    yield "/".join(dict.fromkeys(dtype_name(factor.dtype) for factor in layer.factors.values()))


@functools.cache
def _factor_names(kind: type[Layer]) -> tuple[str, ...]:
    """Return the names of the fields of a layer class that hold tensors."""
    return tuple(field.name for field in fields(kind) if field.name != "alpha")


def _check_factors(layer: Layer) -> None:
    """Raise AdapterFormatError if a tensor is empty or not floating point."""
    for name, factor in layer.factors.items():
        if not factor.is_floating_point():
            raise AdapterFormatError(f"{name} has dtype {factor.dtype}; expected floating point")
        if factor.numel() == 0:
            raise AdapterFormatError(f"{name} has shape {tuple(factor.shape)} and is empty; expected rank 1 or more")


def _check_alpha(alpha: float) -> None:
    if not math.isfinite(alpha):
        raise AdapterFormatError(f"alpha is {alpha}; expected a finite number")


def _format_shapes(layer: Layer) -> str:
    """Return the names and shapes of all factors for a message."""
    return ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in layer.factors.items())


def _check_consistent(consistent: bool, layer: Layer, expected: str) -> None:
    if not consistent:
        raise AdapterFormatError(f"invalid factor shapes ({_format_shapes(layer)}); expected {expected}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoRALayer(Layer):
    """LoRA layer of a linear or convolution module [arXiv:2106.09685]: delta = alpha / rank * up @ down.

    Linear: `down` (rank, in), `up` (out, rank). Convolution: `down` (rank, in, kh, kw), `up` (out, rank, 1, 1). With a
    Tucker core `mid` (rank, rank, kh, kw) between them, `down` is (rank, in, 1, 1) [arXiv:2108.06098, appendix].
    """

    kind: ClassVar[str] = "LoRA"
    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        _check_factors(self)
        _check_alpha(self.alpha)
        down, up, mid = self.down, self.up, self.mid
        valid = down.ndim in (2, 4) and up.ndim == down.ndim and up.shape[1] == down.shape[0]
        valid = valid and tuple(up.shape[2:]) in ((), (1, 1))
        if mid is not None:
            valid = valid and mid.ndim == 4 and tuple(down.shape[2:]) in ((), (1, 1))
            valid = valid and tuple(mid.shape[:2]) == (up.shape[1], down.shape[0])
        _check_consistent(valid, self, "up (out, rank) and down (rank, in), both with 2 or both with 4 dimensions")

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Scale of the delta: alpha / rank."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape (out, in[, kh, kw]) of the weight that this layer updates."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @functools.cached_property
    def truncations(self) -> dict[int, LoRALayer]:
        """Truncations to lower ranks that `truncate_layer` has made so far, by rank."""
        return {}

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (independent of the base)
        """Compute scale * up @ down, in float32 and of shape `weight_shape`."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if self.mid is not None:
            return self.scale * tucker_product(self.mid, up.T, down)
        return (self.scale * (up @ down)).reshape(self.weight_shape)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoHaLayer(Layer):
    """LoHa layer, the Hadamard product of two low-rank matrices [arXiv:2108.06098].

        delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)

    `w1_a` and `w2_a` are (out, rank), `w1_b` and `w2_b` (rank, in), with the kernel of a convolution flattened into
    `in`. With Tucker cores `t1` and `t2` (rank, rank, kh, kw), `w1_a` and `w2_a` are (rank, out).
    """

    kind: ClassVar[str] = "LoHa"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        _check_factors(self)
        _check_alpha(self.alpha)
        valid = (self.t1 is None) == (self.t2 is None)
        valid = valid and all(f.ndim == 2 for f in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        if valid and self.t1 is not None and self.t2 is not None:
            halves = ((self.w1_a, self.t1, self.w1_b), (self.w2_a, self.t2, self.w2_b))
            valid = all(t.ndim == 4 and t.shape[:2] == (a.shape[0], b.shape[0]) for a, t, b in halves)
            valid = valid and self.w1_a.shape[1] == self.w2_a.shape[1] and self.t1.shape[2:] == self.t2.shape[2:]
        elif valid:
            valid = self.w1_a.shape[1] == self.w1_b.shape[0] and self.w2_a.shape[1] == self.w2_b.shape[0]
            valid = valid and self.w1_a.shape[0] == self.w2_a.shape[0]
        valid = valid and self.w1_b.shape[1] == self.w2_b.shape[1]
        _check_consistent(
            valid, self, "w1_a (out, rank), w1_b (rank, in) and the same for w2, or both with Tucker cores"
        )

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        """Scale of the delta: alpha / rank."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape (out, in) of the weight that this layer updates, or (out, in, kh, kw) with Tucker cores."""
        if self.t1 is not None:
            return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])
        return (self.w1_a.shape[0], self.w1_b.shape[1])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (independent of the base)
        """Compute scale * (w1_a @ w1_b) * (w2_a @ w2_b), in float32 and of shape `weight_shape`."""
        first, second = (
            low_rank_product(self.w1_a, self.w1_b, self.t1),
            low_rank_product(self.w2_a, self.w2_b, self.t2),
        )
        return first * second * self.scale


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoKrLayer(Layer):
    """LoKr layer, the Kronecker product of two matrices [arXiv:2309.14859]: delta = alpha / rank * kron(w1, w2).

    The weight has the shape (a * b, c * d[, kh, kw]). Each factor is given in one of these forms:

    - full: `w1` (a, c), `w2` (b, d[, kh, kw]);
    - low-rank: `w1_a` (a, rank) @ `w1_b` (rank, c), `w2_a` (b, rank) @ `w2_b` (rank, d[ * kh * kw]);
    - `w2` only, with a Tucker core: `t2` (rank, rank, kh, kw), `w2_a` (rank, b), `w2_b` (rank, d).

    If both factors are full, the rank counts as 1.
    """

    kind: ClassVar[str] = "LoKr"
    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        _check_factors(self)
        _check_alpha(self.alpha)
        valid = is_one_or_pair(self.w1, self.w1_a, self.w1_b, None)
        valid = valid and is_one_or_pair(self.w2, self.w2_a, self.w2_b, self.t2)
        valid = valid and (self.w1 is None or self.w1.ndim == 2)
        _check_consistent(valid, self, "w1 or the pair w1_a, w1_b, and w2 or the pair w2_a, w2_b, with matching ranks")

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        half = self.w1_b if self.w1_b is not None else self.w2_b
        return 1 if half is None else half.shape[0]

    @property
    def scale(self) -> float:
        """Scale of the delta: alpha / rank."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape (a * b, c * d[, kh, kw]) of the weight that this layer updates."""
        first, second = kronecker_factor_shape(self.w1, self.w1_a, self.w1_b, None), self.second_shape
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    @property
    def second_shape(self) -> tuple[int, ...]:
        """Shape (b, d[, kh, kw]) of the second Kronecker factor."""
        return kronecker_factor_shape(self.w2, self.w2_a, self.w2_b, self.t2)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (independent of the base)
        """Compute scale * kron(w1, w2), in float32 and of shape `weight_shape`."""
        first = kronecker_factor(self.w1, self.w1_a, self.w1_b, None)
        second = kronecker_factor(self.w2, self.w2_a, self.w2_b, self.t2)
        first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
        return first.kron(second.contiguous()) * self.scale


LowRank: TypeAlias = LoRALayer | LoHaLayer | LoKrLayer
"""Layer kinds with low-rank factors and an alpha."""


def with_alpha(layer: T, alpha: float) -> T:
    """Return the layer with another alpha, without validating its factors again."""
    if alpha == layer.alpha:
        return layer
    _check_alpha(alpha)
    changed = copy.copy(layer)
    object.__setattr__(changed, "alpha", alpha)
    return changed


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FullLayer(Layer):
    """Full-rank difference of the weight of a linear, convolution or normalization module."""

    kind: ClassVar[str] = "full"
    diff: Tensor
    """Difference of the weights; 1, 2 or 4 dimensions."""

    def __post_init__(self) -> None:
        _check_factors(self)
        _check_consistent(self.diff.ndim in (1, 2, 4), self, "1, 2 or 4 dimensions")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of `diff`."""
        return tuple(self.diff.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (independent of the base)
        """Return `diff` in float32."""
        return self.diff.float()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DoRALayer(Layer):
    """DoRA layer: a weight decomposition around any of the low-rank kinds [arXiv:2402.09353].

        W' = magnitude * V / norm(V),  V = W + delta of the inner layer

    `magnitude` has one value per output, (out, 1[, 1, 1]), or one per input, (1, in[, 1, 1]), as LyCORIS writes
    with `wd_on_out=False`. The norm runs over the other dimensions.
    """

    kind: ClassVar[str] = "DoRA"
    inner: LowRank
    magnitude: Tensor

    def __post_init__(self) -> None:
        _check_factors(self)
        out, inputs = self.inner.weight_shape[:2]
        shape = tuple(self.magnitude.shape)
        outputs_first = len(shape) > 1 and shape[0] == out and set(shape[1:]) <= {1}
        inputs_second = len(shape) > 1 and shape[0] == 1 and set(shape[2:]) <= {1} and inputs % shape[1] == 0
        _check_consistent(outputs_first or inputs_second, self, f"a magnitude of ({out}, 1) or (1, {inputs})")

    @property
    def factors(self) -> dict[str, Tensor]:
        """Tensors of the inner layer, and `magnitude`."""
        return {**self.inner.factors, "magnitude": self.magnitude}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Return a copy of the layer with some tensors of the inner layer, or `magnitude`, replaced."""
        inner = {name: value for name, value in factors.items() if name != "magnitude"}
        magnitude = factors.get("magnitude", self.magnitude)
        return replace(self, inner=self.inner.with_factors(inner), magnitude=magnitude)

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.inner.rank

    @property
    def alpha(self) -> float:
        """Alpha of the inner layer."""
        return self.inner.alpha

    @property
    def per_output(self) -> bool:
        """Whether there is one magnitude per output rather than per input."""
        return self.magnitude.shape[0] == self.inner.weight_shape[0] and set(self.magnitude.shape[1:]) <= {1}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that the inner layer updates."""
        return self.inner.weight_shape

    def delta(self, base: Tensor | None = None) -> Tensor:
        """Compute W' - W in float32 for the weight W = `base`, which is required."""
        if base is None:
            raise AdapterFormatError("the delta of a DoRA layer depends on the weight of the base; pass it as `base`")
        weight = base.float()
        updated = weight + self.inner.delta().reshape(weight.shape)
        axis = 0 if self.per_output else 1
        others = [dim for dim in range(weight.ndim) if dim != axis]
        norm = updated.square().sum(dim=others, keepdim=True).sqrt().clamp(min=FLOAT32_EPSILON)
        return updated * (self.magnitude.float().reshape(norm.shape) / norm) - weight
