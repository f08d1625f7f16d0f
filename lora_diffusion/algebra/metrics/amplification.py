"""Whether a delta strengthens what the base does already: section 7.3 of LoRA [arXiv:2106.09685].

With U and V the delta's left and right singular vectors, ||U^T W V||_F is how much of the base's weight W lies in the
delta's directions. Beside it stand the most that any directions hold, W's own first ones, and what random ones do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.algebra.metrics.subspace_similarity import leading_directions
from lora_diffusion.algebra.svd.svd import Spectrum, spectrum_norm


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """Frobenius norms at one module."""

    directions: int
    """r, how many directions W is projected onto."""
    delta_norm: float
    base_norm: float
    projected: float
    """||U^T W V|| with the delta's directions."""
    own: float
    """The same with W's own first r singular vectors."""
    random: float
    """The root mean square of the same with random directions, as a random adapter of rank r has."""
    factor: float | None
    """delta_norm / projected; None if W has nothing in these directions."""


def measure_amplification(spectrum: Spectrum, weight: Tensor) -> Amplification:
    """Norms of a delta and of the base's `weight`, (out, in[, kh, kw]), in its directions."""
    matrix = weight.double().flatten(1)
    directions = leading_directions(spectrum)
    count = directions.output.shape[1]
    projected = float((directions.output.T @ matrix @ directions.input).square().sum().sqrt())
    base_norm = float(matrix.square().sum().sqrt())
    delta_norm = spectrum_norm(spectrum)
    return Amplification(
        directions=count,
        delta_norm=delta_norm,
        base_norm=base_norm,
        projected=projected,
        own=leading_norm(matrix, count),
        random=base_norm * count / matrix.numel() ** 0.5,
        factor=delta_norm / projected if projected else None,
    )


def leading_norm(matrix: Tensor, count: int) -> float:
    """Frobenius norm of a matrix in its first `count` singular directions.

    From the eigenvalues of the smaller Gram matrix: of the large values, a tenth of the cost of an SVD and as exact.
    """
    linalg: Any = torch.linalg
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    squares: Tensor = linalg.eigvalsh(gram).clamp(min=0)
    return float(squares[squares.numel() - count :].sum().sqrt())
