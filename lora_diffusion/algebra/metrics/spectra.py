"""What the singular values of a delta say: how strong it is, and over how many directions it spreads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lora_diffusion.algebra.svd.svd import Spectrum

RELATIVE_ZERO = 1e-5
"""Singular values below this part of the largest are the rounding of float32."""
MOST_DIRECTIONS = 128
"""Of a delta with more directions, such as a full difference, only so many are listed and compared."""


def nonzero_values(spectrum: Spectrum) -> Tensor:
    """The singular values that are no rounding, falling, float64 (rank,)."""
    values = spectrum.values.double()
    return values[(values > 0) & (values >= RELATIVE_ZERO * values[0])]


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum [Roy and Vetterli, EUSIPCO 2007].

    From 1 to the number of values, which equal ones give; 0 for none.
    """
    shares = values.double() / values.double().sum()
    return math.exp(-float(torch.xlogy(shares, shares).sum())) if values.numel() else 0.0


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm; 0 for none."""
    return float((values.double() / values[0].double()).square().sum()) if values.numel() else 0.0


def energy_shares(values: Tensor) -> Tensor:
    """Share of the squared Frobenius norm that the first 1, 2, ... directions hold, float64 (rank,)."""
    energy = values.double().square().cumsum(0)
    return energy / energy[-1:]


def rank_holding(values: Tensor, share: float) -> int:
    """The fewest directions that hold a share of the energy."""
    return min(int((energy_shares(values) < share).sum()) + 1, values.numel())


@dataclass(frozen=True, kw_only=True)
class SpectrumStats:
    """One module's delta in numbers."""

    rank: int
    """Singular values that are no rounding."""
    norm: float
    """Frobenius."""
    spectral_norm: float
    effective_rank: float
    stable_rank: float
    rank_90: int
    """Directions that hold 90 % of the energy."""
    rank_99: int
    values: tuple[float, ...]
    """Singular values, falling; the first 128."""
    energy: tuple[float, ...]
    """Share of the energy in the first 1, 2, ... directions."""


def measure_spectrum(spectrum: Spectrum) -> SpectrumStats:
    """The numbers of a delta; all 0 and empty if it is 0."""
    values = nonzero_values(spectrum)
    return SpectrumStats(
        rank=values.numel(),
        norm=float(values.square().sum().sqrt()),
        spectral_norm=float(values[:1].sum()),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        rank_90=rank_holding(values, 0.9),
        rank_99=rank_holding(values, 0.99),
        values=to_list(values[:MOST_DIRECTIONS]),
        energy=to_list(energy_shares(values)[:MOST_DIRECTIONS]),
    )


def to_list(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class BlockStats:
    """Several modules in numbers: medians over them, but for `norm` and `largest_norm`."""

    modules: int
    norm: float
    """Frobenius norm of all their deltas together."""
    median_norm: float
    largest_norm: float
    rank: float
    effective_rank: float
    stable_rank: float
    rank_90: float
    rank_99: float
    values: tuple[float, ...]
    """The k-th singular value; a module of lower rank counts as 0."""


def summarize_block(modules: Sequence[SpectrumStats]) -> BlockStats:
    """Medians and norms of at least one module."""
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
