"""Extract LoRA layers from dense weights: low-rank approximations of a difference of two weights, or of one weight.

Every difference that is not exactly 0 gives a layer, however small it is, and no values are clamped.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.metrics.norms import frobenius_norm
from lora_diffusion.algebra.reduce.resize import CompressionReport, ModuleLoss
from lora_diffusion.algebra.svd.randomized_svd import Sketch, randomized_spectrum, smaller_side
from lora_diffusion.algebra.svd.rank_selection import select_rank
from lora_diffusion.algebra.svd.svd import Spectrum, dense_spectrum, truncate_spectrum
from lora_diffusion.config.combine import RankRule
from lora_diffusion.errors import BaseModelError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """Parameters of the low-rank approximation of dense weights.

    Users set an `ExtractConfig`, from which `workflows.adapters.extract` makes these.

    Raises:
        ConfigError: If a randomized SVD is requested without a fixed rank.
    """

    rule: RankRule
    """Chooses the rank of each layer."""
    sketch: Sketch | None = None
    """Settings of the randomized SVD, used where it is faster than the exact one; None for exact SVDs only."""
    dtype: torch.dtype = torch.float32
    """Dtype of the factors."""

    def __post_init__(self) -> None:
        if self.sketch and self.rule.rank is None:
            raise ConfigError(
                f"the randomized SVD needs a fixed rank, not {self.rule}; set a rank, or use the exact SVD"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Extraction:
    """Extracted layers with their approximation errors."""

    layers: Mapping[str, LoRALayer] = field(repr=False)
    """Layers by module path."""
    report: CompressionReport
    """Approximation error of each layer, including rounding to the dtype of the factors."""
    equal: tuple[str, ...]
    """Paths of the modules whose difference is exactly 0, which have no layer."""


def extract_layers(pairs: Iterable[tuple[str, Tensor, Tensor]], config: Approximation) -> Extraction:
    """Approximate the differences between tuned and base weights by LoRA layers.

    Args:
        pairs: Tuples of module path, base weight and tuned weight, (out, in[, kh, kw]), of any floating-point dtype.
            One of the two weights may lack the dimensions of a 1x1 kernel; the layer has the shape of the base weight.
        config: Settings of the approximation.

    Raises:
        BaseModelError: If a difference contains NaN or infinity.
        ConfigError: If a factor exceeds the range of its dtype.
    """
    return approximate_layers(((path, subtract_weights(base, tuned)) for path, base, tuned in pairs), config)


def subtract_weights(base: Tensor, tuned: Tensor) -> Tensor:
    """Return tuned - base in float32, with the shape of the base weight."""
    return tuned.float().reshape(base.shape) - base.float()


def approximate_layers(weights: Iterable[tuple[str, Tensor]], config: Approximation) -> Extraction:
    """Approximate dense matrices by LoRA layers, one at a time.

    Args:
        weights: Pairs of module path and float32 matrix or kernel, (out, in[, kh, kw]).
        config: Settings of the approximation.

    Returns:
        The layers. Their reported errors are measured on the factors as stored, so they include rounding.

    Raises:
        BaseModelError: If a matrix contains NaN or infinity.
        ConfigError: If a factor exceeds the range of its dtype.
    """
    layers: dict[str, LoRALayer] = {}
    losses: dict[str, ModuleLoss] = {}
    equal: list[str] = []
    for path, weight in check_finite_weights(weights):
        if not weight.any():
            equal.append(path)
            continue
        layer = _closest_layer(path, weight, config)
        layers[path] = layer
        losses[path] = ModuleLoss(
            rank_before=smaller_side(tuple(weight.shape)),
            rank_after=layer.rank,
            norm=frobenius_norm(weight),
            lost=frobenius_norm(weight - layer.delta()),
        )
    return Extraction(layers=layers, report=CompressionReport(modules=losses), equal=tuple(equal))


def check_finite_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights unchanged.

    Raises:
        BaseModelError: If a weight contains NaN or infinity.
    """
    for path, weight in weights:
        if not weight.isfinite().all():
            raise BaseModelError(f"{path}: contains NaN or infinity; the checkpoint is damaged, use another one")
        yield path, weight


def _closest_layer(path: str, weight: Tensor, config: Approximation) -> LoRALayer:
    spectrum = _compute_spectrum(weight, config)
    exact = truncate_spectrum(spectrum, select_rank(config.rule, spectrum.values))
    layer = exact.with_factors({name: factor.to(config.dtype) for name, factor in exact.factors.items()})
    if not all(factor.isfinite().all() for factor in layer.factors.values()):
        raise ConfigError(f"{path}: a LoRA factor is beyond the range of {config.dtype}; choose bfloat16 or float32")
    return layer


def _compute_spectrum(weight: Tensor, config: Approximation) -> Spectrum:
    """Compute the SVD: its leading part by the randomized method where that is allowed and faster, else all of it."""
    rank = config.rule.rank
    if config.sketch and rank is not None and config.sketch.is_worthwhile(tuple(weight.shape), rank):
        return randomized_spectrum(weight, rank, config.sketch)
    return dense_spectrum(weight)
