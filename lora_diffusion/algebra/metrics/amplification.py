"""Amplification of the base weight's directions by a delta: section 7.3 of the LoRA paper [arXiv:2106.09685].

With U and V the left and right singular vectors of the delta, ||U^T W V||_F measures how much of the base weight W lies
in the directions of the delta. For comparison, the same norm is computed for W's own leading singular vectors, which
is the maximum, and for random directions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.algebra.metrics.subspace_similarity import leading_directions
from lora_diffusion.algebra.svd.svd import Spectrum, spectrum_norm


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """Frobenius norms of a delta and of the base weight W at one module."""

    directions: int
    """Number of directions r that W is projected onto."""
    delta_norm: float
    """Frobenius norm of the delta."""
    base_norm: float
    """Frobenius norm of W."""
    projected: float
    """||U^T W V||_F with the singular vectors of the delta."""
    own: float
    """||U^T W V||_F with the first r singular vectors of W."""
    random: float
    """Root mean square of ||U^T W V||_F with random directions, as a random adapter of rank r has."""
    factor: float | None
    """Amplification factor delta_norm / projected; None if `projected` is 0."""


def measure_amplification(spectrum: Spectrum, weight: Tensor) -> Amplification:
    """Measure how much a delta amplifies the directions of the base weight.

    Args:
        spectrum: SVD of the delta.
        weight: Weight of the same module in the base model, (out, in[, kh, kw]).
    """
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
        own=_leading_norm(matrix, count),
        random=base_norm * count / matrix.numel() ** 0.5,
        factor=delta_norm / projected if projected else None,
    )


def _leading_norm(matrix: Tensor, count: int) -> float:
    """Return the Frobenius norm of the best approximation of rank `count`.

    The eigenvalues of the smaller Gram matrix give it at a tenth of the cost of an SVD, and the large ones as exactly.
    """
    linalg: Any = torch.linalg
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues: Tensor = linalg.eigvalsh(gram).clamp(min=0)
    return float(eigenvalues[eigenvalues.numel() - count :].sum().sqrt())
