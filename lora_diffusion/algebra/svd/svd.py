"""Singular values and vectors of deltas, from their factors: of the whole matrix only where it is not low-rank.

The delta of LoRA layers together is up @ down with the factors side by side, so that with up = Q_u R_u and
down^T = Q_d R_d the SVD of the small matrix R_u R_d^T gives that of the delta: a hundred times faster than the SVD of
a 1280 x 1280 matrix of rank 64, and the same to float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.factor_stack import Term, common_weight_shape, split_stackable, stack_factors
from lora_diffusion.adapters.layers import LoRALayer


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """The thin SVD of a delta, its kernel flattened into the inputs: left * values @ right, float32."""

    left: Tensor
    """(out, k), orthonormal columns."""
    values: Tensor
    """(k,), falling."""
    right: Tensor
    """(k, in * kernel), orthonormal rows."""
    shape: tuple[int, ...]
    """Of the weight, (out, in[, kh, kw])."""


def spectrum_of(terms: Sequence[Term], base: Tensor | None = None) -> Spectrum:
    """The SVD of the sum of weighted layers of one module; k is the sum of ranks, or the smaller side for other kinds.

    `base` is the module's own weight, which DoRA needs. Raises AdapterFormatError for DoRA without it.
    """
    joinable, others = split_stackable(terms)
    if others:
        delta = sum_deltas(terms, base)
        return dense_spectrum(delta)
    stack = stack_factors([layer for _, layer in joinable])
    left, mixing_up = qr_factors(stack.weighted_up(joinable))
    right, mixing_down = qr_factors(stack.down.T)
    inner_left, values, inner_right = thin_svd(mixing_up @ mixing_down.T)
    return Spectrum(
        left=left @ inner_left, values=values, right=inner_right @ right.T, shape=common_weight_shape(joinable)
    )


def dense_spectrum(delta: Tensor) -> Spectrum:
    """The SVD of a whole matrix, (out, in[, kh, kw])."""
    matrix = delta.float().reshape(delta.shape[0], -1)
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK takes four times as long for a wide matrix as for a tall one
        right, values, left = thin_svd(matrix.T.contiguous())
        return Spectrum(left=left.T, values=values, right=right.T, shape=tuple(delta.shape))
    left, values, right = thin_svd(matrix)
    return Spectrum(left=left, values=values, right=right, shape=tuple(delta.shape))


def truncate_spectrum(spectrum: Spectrum, rank: int) -> LoRALayer:
    """The closest layer of a rank, in the Frobenius norm [Eckart and Young 1936]; both factors are equally large.

    A rank above that of the spectrum gives the whole delta at the spectrum's rank. Scale is 1 (alpha = rank).
    """
    kept = min(rank, spectrum.values.numel())
    roots = spectrum.values[:kept].sqrt()
    up, down = spectrum.left[:, :kept] * roots, roots[:, None] * spectrum.right[:kept]
    ones = [1] * len(spectrum.shape[2:])
    return LoRALayer(
        up=up.reshape(spectrum.shape[0], kept, *ones).contiguous(),
        down=down.reshape(kept, *spectrum.shape[1:]).contiguous(),
        alpha=float(kept),
    )


def lost_norm(spectrum: Spectrum, rank: int) -> float:
    """Frobenius norm of what `truncate_spectrum` leaves out."""
    return float(spectrum.values[rank:].double().square().sum().sqrt())


def spectrum_norm(spectrum: Spectrum) -> float:
    """Frobenius norm of the delta."""
    return lost_norm(spectrum, 0)


def qr_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Its QR factors; torch's own stub says nothing of their type."""
    linalg: Any = torch.linalg
    basis, mixing = linalg.qr(matrix)
    return basis, mixing


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its thin SVD: left vectors as columns, values, right vectors as rows."""
    linalg: Any = torch.linalg
    left, values, right = linalg.svd(matrix, full_matrices=False)
    return left, values, right
