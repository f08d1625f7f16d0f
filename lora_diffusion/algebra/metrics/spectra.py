"""Statistics of the singular values of deltas: norms, effective rank, stable rank and energy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lora_diffusion.algebra.svd.svd import Spectrum

_RELATIVE_ZERO = 1e-5
"""Singular values below the largest times this are float32 rounding errors."""
MAX_DIRECTIONS = 128
"""Maximum number of singular values listed, and of singular vectors compared, for one delta."""


def nonzero_values(spectrum: Spectrum) -> Tensor:
    """Return the singular values above the float32 rounding error: float64 (rank,), in descending order."""
    values = spectrum.values.double()
    return values[(values > 0) & (values >= _RELATIVE_ZERO * values[0])]


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of the normalized singular values [Roy and Vetterli, EUSIPCO 2007].

    It lies between 1 and the number of values, which it reaches if all values are equal; 0 for no values.
    """
    shares = values.double() / values.double().sum()
    return math.exp(-float(torch.xlogy(shares, shares).sum())) if values.numel() else 0.0


def stable_rank(values: Tensor) -> float:
    """Return the squared Frobenius norm over the squared spectral norm; 0 for no values."""
    return float((values.double() / values[0].double()).square().sum()) if values.numel() else 0.0


def energy_shares(values: Tensor) -> Tensor:
    """Return the fraction of the squared Frobenius norm in the first 1, 2, ... directions, float64 (rank,)."""
    energy = values.double().square().cumsum(0)
    return energy / energy[-1:]


def rank_holding(values: Tensor, share: float) -> int:
    """Return the smallest number of directions that hold a fraction of the squared Frobenius norm."""
    return min(int((energy_shares(values) < share).sum()) + 1, values.numel())


@dataclass(frozen=True, kw_only=True)
class SpectrumStats:
    """Statistics of one module's delta."""

    rank: int
    """Number of singular values above the float32 rounding error."""
    norm: float
    """Frobenius norm."""
    spectral_norm: float
    """Largest singular value."""
    effective_rank: float
    """Exponential of the entropy of the singular values, see `effective_rank`."""
    stable_rank: float
    """Squared Frobenius norm over squared spectral norm."""
    rank_90: int
    """Number of directions that hold 90 % of the squared Frobenius norm."""
    rank_99: int
    """Number of directions that hold 99 % of the squared Frobenius norm."""
    values: tuple[float, ...]
    """Singular values in descending order, at most the first 128."""
    energy: tuple[float, ...]
    """Fraction of the squared Frobenius norm in the first 1, 2, ... directions, at most 128 values."""


def measure_spectrum(spectrum: Spectrum) -> SpectrumStats:
    """Compute the statistics of a delta; for a delta of zeros all numbers are 0 and the tuples are empty."""
    values = nonzero_values(spectrum)
    return SpectrumStats(
        rank=values.numel(),
        norm=float(values.square().sum().sqrt()),
        spectral_norm=float(values[:1].sum()),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        rank_90=rank_holding(values, 0.9),
        rank_99=rank_holding(values, 0.99),
        values=_to_floats(values[:MAX_DIRECTIONS]),
        energy=_to_floats(energy_shares(values)[:MAX_DIRECTIONS]),
    )


def _to_floats(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class BlockStats:
    """Statistics of several modules, such as a UNet block: medians, except for `norm` and `largest_norm`."""

    modules: int
    """Number of modules."""
    norm: float
    """Frobenius norm of all deltas together."""
    median_norm: float
    """Median of the Frobenius norms."""
    largest_norm: float
    """Largest of the Frobenius norms."""
    rank: float
    """Median rank."""
    effective_rank: float
    """Median effective rank."""
    stable_rank: float
    """Median stable rank."""
    rank_90: float
    """Median number of directions that hold 90 % of the squared Frobenius norm."""
    rank_99: float
    """Median number of directions that hold 99 % of the squared Frobenius norm."""
    values: tuple[float, ...]
    """Median of the k-th singular value for k = 1, 2, ...; modules of lower rank count as 0."""


def summarize_block(modules: Sequence[SpectrumStats]) -> BlockStats:
    """Summarize the statistics of one or more modules."""
    norms = [module.norm for module in modules]
    longest = max(len(module.values) for module in modules)
    columns = ([module.values[k] if k < len(module.values) else 0.0 for module in modules] for k in range(longest))
    return BlockStats(
        modules=len(modules),
        norm=math.hypot(*norms),
        median_norm=median(norms),
        largest_norm=max(norms),
        rank=median(module.rank for module in modules),
        effective_rank=median(module.effective_rank for module in modules),
        stable_rank=median(module.stable_rank for module in modules),
        rank_90=median(module.rank_90 for module in modules),
        rank_99=median(module.rank_99 for module in modules),
        values=tuple(median(column) for column in columns),
    )
