"""LoRA layers out of whole weights: the closest of a rank to a difference of two, or to a weight itself.

Every difference that is not exactly zero gives a layer, however small it is, and no value is clamped.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.reduce.resize import CompressionReport, ModuleLoss
from lora_diffusion.algebra.svd.randomized_svd import Sketch, randomized_spectrum, smaller_side
from lora_diffusion.algebra.svd.rank_selection import RankRule, select_rank
from lora_diffusion.algebra.svd.svd import Spectrum, dense_spectrum, truncate_spectrum
from lora_diffusion.errors import BaseModelError, ConfigError

LINALG: Any = torch.linalg  # whose own stub says nothing of its types


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """How a whole weight becomes a layer. Raises ConfigError for a sketch without a fixed rank."""

    rule: RankRule
    sketch: Sketch | None = None
    """Find the values at random where that pays; without it every SVD is the whole one."""
    dtype: torch.dtype = torch.float32
    """Type of the factors."""

    def __post_init__(self) -> None:
        if self.sketch and self.rule.rank is None:
            raise ConfigError(f"the randomized method needs a fixed rank, not {self.rule}; give a rank, or use `exact`")


@dataclass(frozen=True, kw_only=True, eq=False)
class Extraction:
    """Layers by module path, what each of them misses, and where there was nothing."""

    layers: Mapping[str, LoRALayer]
    report: CompressionReport
    equal: tuple[str, ...]
    """Modules whose difference is exactly zero, which have no layer."""


def extract_layers(pairs: Iterable[tuple[str, Tensor, Tensor]], how: Approximation) -> Extraction:
    """Layers for modules as (path, base's weight, tuned weight), both (out, in[, kh, kw]), in any floating type.

    A 1x1 kernel may be left out of one of the two; layers have the base's shape. Raises as `approximate_layers` does.
    """
    return approximate_layers(((path, subtract_weights(base, tuned)) for path, base, tuned in pairs), how)


def subtract_weights(base: Tensor, tuned: Tensor) -> Tensor:
    """What was added to a weight, float32, which a subtraction rounds but once."""
    return tuned.float().reshape(base.shape) - base.float()


def approximate_layers(weights: Iterable[tuple[str, Tensor]], how: Approximation) -> Extraction:
    """The closest layers to whole matrices, (out, in[, kh, kw]) by module path; takes them one at a time.

    The loss of each is the norm of weight minus layer as it is stored, rounding included. Raises BaseModelError for NaN
    or infinity, ConfigError for factors beyond the range of their type.
    """
    layers: dict[str, LoRALayer] = {}
    losses: dict[str, ModuleLoss] = {}
    equal: list[str] = []
    for path, weight in check_finite_weights(weights):
        if not weight.any():
            equal.append(path)
            continue
        layer = closest_layer(path, weight, how)
        layers[path] = layer
        losses[path] = ModuleLoss(
            rank_before=smaller_side(tuple(weight.shape)),
            rank_after=layer.rank,
            norm=frobenius_norm(weight),
            lost=frobenius_norm(weight - layer.delta()),
        )
    return Extraction(layers=layers, report=CompressionReport(modules=losses), equal=tuple(equal))


def check_finite_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. Raises BaseModelError for NaN or infinity."""
    for path, weight in weights:
        if not weight.isfinite().all():
            raise BaseModelError(f"{path}: holds NaN or infinity; the checkpoint is broken, use another")
        yield path, weight


def closest_layer(path: str, weight: Tensor, how: Approximation) -> LoRALayer:
    """One layer, in its type."""
    spectrum = compute_spectrum(weight, how)
    exact = truncate_spectrum(spectrum, select_rank(how.rule, spectrum.values))
    layer = exact.with_factors({name: factor.to(how.dtype) for name, factor in exact.factors.items()})
    if not all(factor.isfinite().all() for factor in layer.factors.values()):
        raise ConfigError(f"{path}: a factor is beyond the range of {how.dtype}; choose bfloat16 or float32")
    return layer


def compute_spectrum(weight: Tensor, how: Approximation) -> Spectrum:
    """The whole spectrum, or its beginning if it may be sketched and that pays."""
    rank = how.rule.rank
    if how.sketch and rank is not None and how.sketch.is_worthwhile(tuple(weight.shape), rank):
        return randomized_spectrum(weight, rank, how.sketch)
    return dense_spectrum(weight)


def frobenius_norm(tensor: Tensor) -> float:
    """Frobenius, summed in float64."""
    return float(LINALG.vector_norm(tensor, dtype=torch.float64))
