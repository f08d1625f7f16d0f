"""The smallest space that holds the deltas of several LoRA layers of one module, and each delta as a core in it.

A merge that works entry by entry, such as TIES, needs one set of coordinates for all layers and would otherwise need
the whole (out x in) matrices. In Core Space [arXiv:2509.17786] the coordinates are orthonormal bases of all outputs and
of all inputs that any layer has, so that every delta is a matrix of at most (sum of ranks x sum of ranks),

    delta_i = left @ core_i @ right,

without loss, and the way back is as short. The paper takes the bases from an SVD of the factors themselves, stacked, so
that they change when a layer's numbers move from up to down. Here they are the singular vectors of the deltas side by
side and one below the other, from the same small factors: the bases depend on the deltas alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diffusion.adapters.factor_stack import common_weight_shape
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.svd.svd import Spectrum, qr_factors, thin_svd, truncate_spectrum

RESOLUTION = 1e-6
"""Directions that are weaker than this share of the strongest are what rounding to float32 leaves; they are dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CoreSpace:
    """Several layers of one module in shared coordinates, float64, kernels flattened into the inputs."""

    left: Tensor
    """(out, p), orthonormal columns, the directions of the outputs from strong to weak."""
    right: Tensor | None
    """(q, in * kernel), orthonormal rows, the same of the inputs; None where the inputs are their own coordinates."""
    cores: Tensor
    """(n, p, q): one core for each layer, at weight 1, its scale included."""
    shape: tuple[int, ...]
    """Of the weight, (out, in[, kh, kw])."""


def build_core_space(layers: Sequence[LoRALayer]) -> CoreSpace:
    """Core Space of the layers of one module [arXiv:2509.17786]; no layer has a Tucker core.

    p and q are the ranks of all deltas side by side and one below the other: at most the sum of the layers' ranks.
    """
    pairs = [scaled_factors(layer) for layer in layers]
    left, right = output_basis(pairs), output_basis([(down.T, up.T) for up, down in pairs]).T
    cores = torch.stack([(left.T @ up) @ (down @ right.T) for up, down in pairs])
    return CoreSpace(left=left, right=right, cores=cores, shape=common_shape(layers))


def build_knots_space(layers: Sequence[LoRALayer]) -> CoreSpace:
    """The coordinates of KnOTS [arXiv:2410.19735]: U of [delta_1 ... delta_n] = U S [V_1^T ... V_n^T].

    Each core is S V_i^T (p x in), which keeps the inputs as they are: the part of V that belongs to the layer, with the
    singular values on it, as in all of the authors' settings. It equals U^T delta_i, so that no whole matrix is formed.
    """
    pairs = [scaled_factors(layer) for layer in layers]
    left = output_basis(pairs)
    cores = torch.stack([(left.T @ up) @ down for up, down in pairs])
    return CoreSpace(left=left, right=None, cores=cores, shape=common_shape(layers))


def layer_from_core(space: CoreSpace, core: Tensor) -> LoRALayer:
    """The layer whose delta is left @ core @ right: the core (p, q) by its SVD, of the core's own rank, scale 1."""
    inner_left, values, inner_right = thin_svd(core)
    right = inner_right if space.right is None else inner_right @ space.right
    spectrum = Spectrum(
        left=(space.left @ inner_left).float(), values=values.float(), right=right.float(), shape=space.shape
    )
    return truncate_spectrum(spectrum, count_significant(values))


def scaled_factors(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """Up (out, rank), times the scale, and down (rank, in * kernel), float64."""
    return layer.scale * layer.up.double().flatten(1), layer.down.double().flatten(1)


def output_basis(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The left singular vectors (out, p) of all up_i @ down_i side by side, without those of rounding.

    With down_i^T = Q R, up_i @ R^T has the same left singular vectors and values as up_i @ down_i, in rank columns.
    """
    left, values, _ = thin_svd(torch.cat([up @ qr_factors(down.T)[1].T for up, down in pairs], dim=1))
    return left[:, : count_significant(values)]


def count_significant(values: Tensor) -> int:
    """How many singular values are more than rounding; at least 1, as no layer has rank 0."""
    return max(1, int((values > RESOLUTION * values[0]).sum()))


def common_shape(layers: Sequence[LoRALayer]) -> tuple[int, ...]:
    return common_weight_shape([(1.0, layer) for layer in layers])
