"""Overlap of two adapters: how far their deltas use the same directions, and whether they agree in them.

A high overlap predicts that two adapters interfere when they are blended. Everything is computed from singular values
and vectors with (rank x rank) products; no dense delta is formed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from torch import Tensor

from lora_diffusion.algebra.metrics.subspace_similarity import Directions, leading_directions
from lora_diffusion.algebra.svd.svd import Spectrum, spectrum_norm


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Overlap of the deltas d1 and d2 of two adapters, at one module or summed over several.

    The fields are inner products and squared Frobenius norms, so the overlap of a block, or of whole adapters, is the
    sum over its modules; the properties are the ratios derived from them.
    """

    inner: float = 0.0
    """Inner product <d1, d2>."""
    first_energy: float = 0.0
    """||d1||^2."""
    second_energy: float = 0.0
    """||d2||^2."""
    first_inside: float = 0.0
    """||U2 U2^T d1 V2 V2^T||^2: energy of d1 in the output and input directions of d2."""
    second_inside: float = 0.0
    """||U1 U1^T d2 V1 V1^T||^2: energy of d2 in the output and input directions of d1."""
    first_chance: float = 0.0
    """Expected `first_inside` if the directions of d2 were random."""
    second_chance: float = 0.0
    """Expected `second_inside` if the directions of d1 were random."""

    @property
    def cosine(self) -> float:
        """Cosine similarity <d1, d2> / (|d1| |d2|), from -1 (opposite) to 1 (same direction); 0 if a delta is 0."""
        norms = (self.first_energy * self.second_energy) ** 0.5
        return min(max(self.inner / norms, -1.0), 1.0) if norms else 0.0

    @property
    def first_share(self) -> float:
        """Fraction of d1's energy in the directions of d2."""
        return _fraction(self.first_inside, self.first_energy)

    @property
    def second_share(self) -> float:
        """Fraction of d2's energy in the directions of d1."""
        return _fraction(self.second_inside, self.second_energy)

    @property
    def shared(self) -> float:
        """Mean of `first_share` and `second_share`."""
        return (self.first_share + self.second_share) / 2

    @property
    def chance(self) -> float:
        """Expected `shared` of random directions."""
        return (_fraction(self.first_chance, self.first_energy) + _fraction(self.second_chance, self.second_energy)) / 2


def _fraction(part: float, whole: float) -> float:
    return min(part / whole, 1.0) if whole else 0.0


def measure_overlap(first: Spectrum | None, second: Spectrum | None) -> Overlap:
    """Measure the overlap of two adapters at one module.

    Args:
        first: SVD of the first adapter's delta; None if the adapter does not change the module.
        second: SVD of the second adapter's delta, likewise.
    """
    if first is None or second is None:
        return Overlap(
            first_energy=spectrum_norm(first) ** 2 if first else 0.0,
            second_energy=spectrum_norm(second) ** 2 if second else 0.0,
        )
    outputs = first.left.double().T @ second.left.double()
    inputs = first.right.double() @ second.right.double().T
    values = first.values.double()[:, None] * second.values.double()
    first_energy, second_energy = spectrum_norm(first) ** 2, spectrum_norm(second) ** 2
    first_directions, second_directions = leading_directions(first), leading_directions(second)
    return Overlap(
        inner=float((values * outputs * inputs).sum()),
        first_energy=first_energy,
        second_energy=second_energy,
        first_inside=_energy_inside(first, second_directions),
        second_inside=_energy_inside(second, first_directions),
        first_chance=first_energy * _random_share(second_directions),
        second_chance=second_energy * _random_share(first_directions),
    )


def _energy_inside(spectrum: Spectrum, directions: Directions) -> float:
    """Return ||U^T delta V||_F^2 for a delta and the directions U and V of another delta."""
    left: Tensor = directions.output.T @ spectrum.left.double()
    right: Tensor = spectrum.right.double() @ directions.input
    return float(((left * spectrum.values.double()) @ right).square().sum())


def _random_share(directions: Directions) -> float:
    """Return the expected fraction of a matrix's energy that this number of random directions holds."""
    count = directions.output.shape[1]
    return count**2 / (directions.output.shape[0] * directions.input.shape[0])


def sum_overlaps(overlaps: Iterable[Overlap]) -> Overlap:
    """Sum the overlaps of several modules, field by field."""
    columns = zip(*(astuple(overlap) for overlap in overlaps), strict=True)
    return Overlap(**dict(zip(Overlap.__dataclass_fields__, map(sum, columns), strict=True)))
