"""The first singular values and vectors of a large matrix, from its products with a few random vectors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.algebra.svd.svd import Spectrum, qr_factors, thin_svd

WELL_BELOW = 4
"""The sketch pays where it has at most a quarter of the smaller side's columns."""


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """How the range of a matrix is found at random; the same seed gives the same result."""

    oversampling: int = 10
    """Random vectors beyond the rank."""
    power_iterations: int = 2
    """How often the sketch goes through the matrix and back, which a slowly falling spectrum needs."""
    seed: int = 0

    def is_worthwhile(self, shape: tuple[int, ...], rank: int) -> bool:
        """Whether the rank is well below the smaller side of a weight, (out, in[, kh, kw])."""
        return WELL_BELOW * (rank + self.oversampling) <= smaller_side(shape)


def smaller_side(shape: tuple[int, ...]) -> int:
    """The highest rank that a weight can have, its kernel flattened into the inputs."""
    return min(shape[0], torch.Size(shape[1:]).numel())


def randomized_spectrum(delta: Tensor, rank: int, sketch: Sketch) -> Spectrum:
    """About the first rank + oversampling singular values and vectors of a whole matrix, (out, in[, kh, kw]).

    The randomized range finder with power iterations, orthonormal after every product [arXiv:0909.4061, algorithms 4.4
    and 5.1]. A truncation of it loses sqrt(|delta|^2 - sum of the kept values squared), little more than the best does.
    """
    matrix = delta.float().reshape(delta.shape[0], -1)
    rng = torch.Generator(device="cpu").manual_seed(sketch.seed)
    probes = torch.randn(matrix.shape[1], rank + sketch.oversampling, generator=rng).to(matrix.device)
    basis, _ = qr_factors(matrix @ probes)
    for _ in range(sketch.power_iterations):
        rows, _ = qr_factors(matrix.T @ basis)
        basis, _ = qr_factors(matrix @ rows)
    left, values, right = thin_svd(basis.T @ matrix)
    return Spectrum(left=basis @ left, values=values, right=right, shape=tuple(delta.shape))
