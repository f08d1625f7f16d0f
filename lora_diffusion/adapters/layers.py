"""What an adapter does to one weight: the kinds of layer, as values.

Every kind knows its own factors and its delta, in float32, at weight 1. All but DoRA are linear: their delta needs no
base. The formulas are those of the papers and of the tools that write the files [github.com/KohakuBlueleaf/LyCORIS,
github.com/huggingface/peft], so that a file means here what it means there.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias, TypeVar

from lora_diffusion.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", bound="LowRank")
FLOAT32_EPSILON = 2.0**-23


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer(ABC):
    """The update of one weight."""

    kind: ClassVar[str]

    @property
    def factors(self) -> dict[str, Tensor]:
        """Its tensors by field name, in a fixed order."""
        values = ((name, getattr(self, name)) for name in factor_names(type(self)))
        return {name: value for name, value in values if value is not None}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """The same layer with some of its tensors replaced."""
        return replace(self, **factors)

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer updates, as far as its factors tell.

        A LoHa or LoKr layer of a convolution holds its kernel flattened and says (out, in * kh * kw).
        """

    @abstractmethod
    def delta(self, base: Tensor | None = None) -> Tensor:
        """What it adds to the weight, float32, of shape `weight_shape`; DoRA needs the `base` weight itself."""


@functools.cache
def factor_names(kind: type[Layer]) -> tuple[str, ...]:
    """The fields of a kind that hold tensors."""
    return tuple(field.name for field in fields(kind) if field.name != "alpha")


def check_factors(layer: Layer) -> None:
    """Raise AdapterFormatError for a tensor that no arithmetic can use."""
    for name, factor in layer.factors.items():
        if not factor.is_floating_point():
            raise AdapterFormatError(f"{name} is of type {factor.dtype}; expected floating point")
        if factor.numel() == 0:
            raise AdapterFormatError(f"{name} of shape {tuple(factor.shape)} is empty; expected at least rank 1")


def check_alpha(alpha: float) -> None:
    if not math.isfinite(alpha):
        raise AdapterFormatError(f"alpha is {alpha}; expected a finite number")


def format_shapes(layer: Layer) -> str:
    """All factors with their shapes, for a message."""
    return ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in layer.factors.items())


def check_consistent(consistent: bool, layer: Layer, expected: str) -> None:
    if not consistent:
        raise AdapterFormatError(f"factors do not follow each other ({format_shapes(layer)}); expected {expected}")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRALayer(Layer):
    """The low-rank update of one linear or convolution module [arXiv:2106.09685].

    Linear: `down` (rank, in), `up` (out, rank). Convolution: `down` (rank, in, kh, kw), `up` (out, rank, 1, 1); with a
    Tucker core `mid` (rank, rank, kh, kw) between them, `down` is (rank, in, 1, 1) [arXiv:2108.06098, appendix].
    """

    kind: ClassVar[str] = "LoRA"
    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        check_factors(self)
        check_alpha(self.alpha)
        down, up, mid = self.down, self.up, self.mid
        good = down.ndim in (2, 4) and up.ndim == down.ndim and up.shape[1] == down.shape[0]
        good = good and tuple(up.shape[2:]) in ((), (1, 1))
        if mid is not None:
            good = good and mid.ndim == 4 and tuple(down.shape[2:]) in ((), (1, 1))
            good = good and tuple(mid.shape[:2]) == (up.shape[1], down.shape[0])
        check_consistent(good, self, "up (out, rank) after down (rank, in), both with 2 or both with 4 dimensions")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (linear in its factors, whatever the base)
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if self.mid is not None:
            return self.scale * tucker_product(self.mid, up.T, down)
        return (self.scale * (up @ down)).reshape(self.weight_shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoHaLayer(Layer):
    """The Hadamard product of two low-rank updates [arXiv:2108.06098].

    `w1_a`, `w2_a` (out, rank) and `w1_b`, `w2_b` (rank, in), the kernel of a convolution flattened into `in`. With
    Tucker cores `t1`, `t2` (rank, rank, kh, kw) the first two are (rank, out).
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
        check_factors(self)
        check_alpha(self.alpha)
        good = (self.t1 is None) == (self.t2 is None)
        good = good and all(f.ndim == 2 for f in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        if good and self.t1 is not None and self.t2 is not None:
            halves = ((self.w1_a, self.t1, self.w1_b), (self.w2_a, self.t2, self.w2_b))
            good = all(t.ndim == 4 and t.shape[:2] == (a.shape[0], b.shape[0]) for a, t, b in halves)
            good = good and self.w1_a.shape[1] == self.w2_a.shape[1] and self.t1.shape[2:] == self.t2.shape[2:]
        elif good:
            good = self.w1_a.shape[1] == self.w1_b.shape[0] and self.w2_a.shape[1] == self.w2_b.shape[0]
            good = good and self.w1_a.shape[0] == self.w2_a.shape[0]
        good = good and self.w1_b.shape[1] == self.w2_b.shape[1]
        check_consistent(good, self, "w1_a (out, rank), w1_b (rank, in) and the same for w2, or both with Tucker cores")

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.t1 is not None:
            return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])
        return (self.w1_a.shape[0], self.w1_b.shape[1])

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (linear in its factors, whatever the base)
        first, second = low_rank_product(self.w1_a, self.w1_b, self.t1), low_rank_product(self.w2_a, self.w2_b, self.t2)
        return first * second * self.scale


@dataclass(frozen=True, kw_only=True, eq=False)
class LoKrLayer(Layer):
    """The Kronecker product of a small matrix and a larger one [arXiv:2309.14859].

    Each of the two is whole, `w1` (a, c) and `w2` (b, d[, kh, kw]), or low-rank, `w1_a` (a, rank), `w1_b` (rank, c)
    and `w2_a` (b, rank), `w2_b` (rank, d[ * kh * kw]), or for w2 with a Tucker core `t2` and `w2_a` (rank, b). The
    weight is (a * b, c * d[, kh, kw]). The scale is alpha / rank, where two whole matrices count as rank 1.
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
        check_factors(self)
        check_alpha(self.alpha)
        good = is_one_or_pair(self.w1, self.w1_a, self.w1_b, None)
        good = good and is_one_or_pair(self.w2, self.w2_a, self.w2_b, self.t2)
        good = good and (self.w1 is None or self.w1.ndim == 2)
        check_consistent(good, self, "w1 or the pair w1_a, w1_b, and w2 or the pair w2_a, w2_b, with matching ranks")

    @property
    def rank(self) -> int:
        half = self.w1_b if self.w1_b is not None else self.w2_b
        return 1 if half is None else half.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        first, second = kronecker_factor_shape(self.w1, self.w1_a, self.w1_b, None), self.second_shape
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    @property
    def second_shape(self) -> tuple[int, ...]:
        return kronecker_factor_shape(self.w2, self.w2_a, self.w2_b, self.t2)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (linear in its factors, whatever the base)
        first = kronecker_factor(self.w1, self.w1_a, self.w1_b, None)
        second = kronecker_factor(self.w2, self.w2_a, self.w2_b, self.t2)
        first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
        return first.kron(second.contiguous()) * self.scale


LowRank: TypeAlias = LoRALayer | LoHaLayer | LoKrLayer
"""The kinds that have factors and an alpha."""


def with_alpha(layer: T, alpha: float) -> T:
    """The same layer with another alpha; its factors, which fit already, are not looked at again."""
    if alpha == layer.alpha:
        return layer
    check_alpha(alpha)
    changed = copy.copy(layer)
    object.__setattr__(changed, "alpha", alpha)
    return changed


@dataclass(frozen=True, kw_only=True, eq=False)
class FullLayer(Layer):
    """A difference of full rank, of a module of any kind: a matrix, a convolution, or a norm's weights."""

    kind: ClassVar[str] = "full"
    diff: Tensor

    def __post_init__(self) -> None:
        check_factors(self)
        check_consistent(self.diff.ndim in (1, 2, 4), self, "1, 2 or 4 dimensions")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:  # noqa: ARG002 (it is the difference, whatever the base)
        return self.diff.float()


@dataclass(frozen=True, kw_only=True, eq=False)
class DoRALayer(Layer):
    """Weight decomposition around any of the low-rank kinds [arXiv:2402.09353].

        W' = magnitude * V / norm(V),  V = W + inner delta

    `magnitude` has one value per output, (out, 1[, 1, 1]), or per input, (1, in[, 1, 1]); the norm runs over the other
    dimensions. Files of both kinds exist, told apart by that shape.
    """

    kind: ClassVar[str] = "DoRA"
    inner: LowRank
    magnitude: Tensor

    def __post_init__(self) -> None:
        check_factors(self)
        out, inputs = self.inner.weight_shape[:2]
        shape = tuple(self.magnitude.shape)
        outputs_first = len(shape) > 1 and shape[0] == out and set(shape[1:]) <= {1}
        inputs_second = len(shape) > 1 and shape[0] == 1 and set(shape[2:]) <= {1} and inputs % shape[1] == 0
        check_consistent(outputs_first or inputs_second, self, f"a magnitude of ({out}, 1) or (1, {inputs})")

    @property
    def factors(self) -> dict[str, Tensor]:
        return {**self.inner.factors, "magnitude": self.magnitude}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        inner = {name: value for name, value in factors.items() if name != "magnitude"}
        magnitude = factors.get("magnitude", self.magnitude)
        return replace(self, inner=self.inner.with_factors(inner), magnitude=magnitude)

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def alpha(self) -> float:
        return self.inner.alpha

    @property
    def per_output(self) -> bool:
        """Whether there is one magnitude per output."""
        return self.magnitude.shape[0] == self.inner.weight_shape[0] and set(self.magnitude.shape[1:]) <= {1}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.inner.weight_shape

    def delta(self, base: Tensor | None = None) -> Tensor:
        if base is None:
            raise AdapterFormatError("a DoRA layer has no delta of its own; it needs the base's weight")
        weight = base.float()
        moved = weight + self.inner.delta().reshape(weight.shape)
        axis = 0 if self.per_output else 1
        others = [dim for dim in range(weight.ndim) if dim != axis]
        norm = moved.square().sum(dim=others, keepdim=True).sqrt().clamp(min=FLOAT32_EPSILON)
        return moved * (self.magnitude.float().reshape(norm.shape) / norm) - weight


def tucker_product(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(out, in, kh, kw) from a core (r, q, kh, kw), `first` (r, out) and `second` (q, in)."""
    import torch

    return torch.einsum("ijkl,ip,jr->prkl", core.float(), first.float(), second.float())


def low_rank_product(first: Tensor, second: Tensor, core: Tensor | None) -> Tensor:
    """One low-rank matrix, float32."""
    return first.float() @ second.float() if core is None else tucker_product(core, first, second)


def kronecker_factor(whole: Tensor | None, first: Tensor | None, second: Tensor | None, core: Tensor | None) -> Tensor:
    """One side of a Kronecker product, float32."""
    if whole is not None:
        return whole.float()
    assert first is not None and second is not None
    return low_rank_product(first, second, core)


def kronecker_factor_shape(
    whole: Tensor | None, first: Tensor | None, second: Tensor | None, core: Tensor | None
) -> tuple[int, ...]:
    if whole is not None:
        return tuple(whole.shape)
    assert first is not None and second is not None
    if core is not None:
        return (first.shape[1], second.shape[1], *core.shape[2:])
    return (first.shape[0], second.shape[1])


def is_one_or_pair(whole: Tensor | None, first: Tensor | None, second: Tensor | None, core: Tensor | None) -> bool:
    """Whether one side of a Kronecker product is there exactly once, with ranks that fit."""
    if whole is not None:
        return first is None and second is None and core is None and whole.ndim in (2, 4)
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    if core is None:
        return first.shape[1] == second.shape[0]
    return core.ndim == 4 and tuple(core.shape[:2]) == (first.shape[0], second.shape[0])
