"""Randomized SVD: the leading singular values and vectors of a large matrix [Halko et al., arXiv:0909.4061]."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_diffusion.algebra.svd.svd import Spectrum, qr_factors, thin_svd

_MIN_SIZE_RATIO = 4
"""The randomized SVD is faster than the exact one if the smaller side has at least this many times the columns."""


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Parameters of the randomized SVD; the same seed gives the same result.

    They are not settings: users only choose whether the SVD is randomized (`ExtractConfig.method`).
    """

    oversampling: int = 10
    """Number of random vectors beyond the rank."""
    power_iterations: int = 2
    """Number of subspace iterations. Spectra that decay slowly need more of them."""
    seed: int = 0
    """Seed of the random vectors."""

    def is_worthwhile(self, shape: tuple[int, ...], rank: int) -> bool:
        """Return whether the rank is so small that the randomized SVD is faster than the exact one.

        Args:
            shape: Shape of the weight, (out, in[, kh, kw]).
            rank: Number of singular values to compute.
        """
        return _MIN_SIZE_RATIO * (rank + self.oversampling) <= smaller_side(shape)


def smaller_side(shape: tuple[int, ...]) -> int:
    """Return the highest rank that a weight of shape (out, in[, kh, kw]) can have: min(out, in * kh * kw)."""
    return min(shape[0], torch.Size(shape[1:]).numel())


def randomized_svd(
    matrix: Tensor, size: int, *, power_iterations: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate the leading singular values and vectors of a matrix.

    Uses the randomized range finder with power iterations, orthonormalized after every product [arXiv:0909.4061,
    algorithms 4.4 and 5.1].

    Args:
        matrix: Floating-point matrix (out, in).
        size: Number of random vectors and of singular values returned, at most min(out, in). Choose it larger than the
            number of values needed, because the last ones are inaccurate.
        power_iterations: Number of subspace iterations.
        generator: CPU generator that the random vectors are drawn from.

    Returns:
        Left singular vectors (out, size), singular values (size,) in descending order, and right singular vectors
        (size, in).
    """
    probes = torch.randn(matrix.shape[1], size, generator=generator).to(matrix.device)
    basis, _ = qr_factors(matrix @ probes)
    for _ in range(power_iterations):
        rows, _ = qr_factors(matrix.T @ basis)
        basis, _ = qr_factors(matrix @ rows)
    left, values, right = thin_svd(basis.T @ matrix)
    return basis @ left, values, right


def randomized_spectrum(delta: Tensor, rank: int, sketch: Sketch) -> Spectrum:
    """Approximate the first `rank + oversampling` singular values and vectors of a dense delta.

    Truncating the result to `rank` leaves an error of sqrt(|delta|^2 - sum of the squared values kept), only slightly
    more than the optimum.

    Args:
        delta: Dense matrix or kernel (out, in[, kh, kw]); kernels are flattened into the inputs.
        rank: Number of singular values that must be accurate.
        sketch: Settings of the randomized SVD.
    """
    matrix = delta.float().reshape(delta.shape[0], -1)
    generator = torch.Generator(device="cpu").manual_seed(sketch.seed)
    left, values, right = randomized_svd(
        matrix, rank + sketch.oversampling, power_iterations=sketch.power_iterations, generator=generator
    )
    return Spectrum(left=left, values=values, right=right, shape=tuple(delta.shape))
