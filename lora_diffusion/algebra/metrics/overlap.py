"""How much two adapters will fight: where they write into the same directions, and whether they agree there.

All of it comes from the singular vectors and values, by products of rank x rank; no whole matrix is formed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from torch import Tensor

from lora_diffusion.algebra.metrics.subspace_similarity import Directions, leading_directions
from lora_diffusion.algebra.svd.svd import Spectrum, spectrum_norm


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Sums over modules, in squared Frobenius norms: the overlap of blocks, and of whole adapters, is their sum."""

    inner: float = 0.0
    """<d1, d2>, the inner product of the deltas."""
    first_energy: float = 0.0
    second_energy: float = 0.0
    first_inside: float = 0.0
    """||U2 U2^T d1 V2 V2^T||^2, what of the first delta lies in the second's output and input directions."""
    second_inside: float = 0.0
    first_chance: float = 0.0
    """The same on average if the second's directions were random."""
    second_chance: float = 0.0

    @property
    def cosine(self) -> float:
        """<d1, d2> / (|d1| |d2|): 1 the same change, 0 unrelated, -1 opposite; 0 if one of them is 0."""
        norms = (self.first_energy * self.second_energy) ** 0.5
        return min(max(self.inner / norms, -1.0), 1.0) if norms else 0.0

    @property
    def first_share(self) -> float:
        """Share of the first delta's energy in the second's directions."""
        return ratio(self.first_inside, self.first_energy)

    @property
    def second_share(self) -> float:
        return ratio(self.second_inside, self.second_energy)

    @property
    def shared(self) -> float:
        """Share of both adapters' energy in the other's directions, at equal strength: the mean of the two shares."""
        return (self.first_share + self.second_share) / 2

    @property
    def chance(self) -> float:
        """Expected `shared` of random directions."""
        return (ratio(self.first_chance, self.first_energy) + ratio(self.second_chance, self.second_energy)) / 2


def ratio(part: float, whole: float) -> float:
    return min(part / whole, 1.0) if whole else 0.0


def measure_overlap(first: Spectrum | None, second: Spectrum | None) -> Overlap:
    """The overlap at one module; None for an adapter that does not change it."""
    if first is None or second is None:
        return Overlap(
            first_energy=spectrum_norm(first) ** 2 if first else 0.0,
            second_energy=spectrum_norm(second) ** 2 if second else 0.0,
        )
    outputs = first.left.double().T @ second.left.double()
    inputs = first.right.double() @ second.right.double().T
    values = first.values.double()[:, None] * second.values.double()
    first_energy, second_energy = spectrum_norm(first) ** 2, spectrum_norm(second) ** 2
    one, two = leading_directions(first), leading_directions(second)
    return Overlap(
        inner=float((values * outputs * inputs).sum()),
        first_energy=first_energy,
        second_energy=second_energy,
        first_inside=energy_inside(first, two),
        second_inside=energy_inside(second, one),
        first_chance=first_energy * random_share(two),
        second_chance=second_energy * random_share(one),
    )


def energy_inside(spectrum: Spectrum, directions: Directions) -> float:
    """||U^T delta V||_F^2 for a delta, and the directions U and V of another."""
    left: Tensor = directions.output.T @ spectrum.left.double()
    right: Tensor = spectrum.right.double() @ directions.input
    return float(((left * spectrum.values.double()) @ right).square().sum())


def random_share(directions: Directions) -> float:
    """The share of a matrix's energy that random directions of these numbers hold on average."""
    count = directions.output.shape[1]
    return count**2 / (directions.output.shape[0] * directions.input.shape[0])


def sum_overlaps(overlaps: Iterable[Overlap]) -> Overlap:
    """The overlap of several modules together."""
    columns = zip(*(astuple(overlap) for overlap in overlaps), strict=True)
    return Overlap(**dict(zip(Overlap.__dataclass_fields__, map(sum, columns), strict=True)))
