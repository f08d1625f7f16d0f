"""Core Space: represent the LoRA deltas of one module as small matrices in shared orthonormal bases.

Merge methods that compare deltas entry by entry, such as TIES, need all of them in the same coordinates, and would
otherwise need the dense (out x in) matrices. Core Space [arXiv:2509.17786] uses orthonormal bases of all output
directions and of all input directions that any layer has. Each delta then becomes a core of at most (sum of ranks x sum
of ranks),

    delta_i = left @ core_i @ right,

without loss. The paper takes the bases from SVDs of the stacked factors, so they change if a factor is rescaled and the
other one compensates. Here they are the singular vectors of the concatenated deltas, computed from the same factors at
the same cost: the bases depend on the deltas alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diffusion.adapters.factor_stack import common_weight_shape
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.svd.svd import Spectrum, qr_factors, thin_svd, truncate_spectrum

_RELATIVE_ZERO = 1e-6
"""Singular values up to the largest times this are float32 rounding errors; their directions are dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CoreSpace:
    """Deltas of several layers of one module in shared bases, float64; kernels are flattened into the inputs."""

    left: Tensor = field(repr=False)
    """Basis of the outputs (out, p): orthonormal columns, strongest direction first."""
    right: Tensor | None = field(repr=False)
    """Basis of the inputs (q, in * kh * kw): orthonormal rows, strongest first; None for the standard basis."""
    cores: Tensor = field(repr=False)
    """Cores (n, p, q), one for each layer at weight 1, with alpha / rank included."""
    shape: tuple[int, ...]
    """Shape of the weight, (out, in[, kh, kw])."""


def build_core_space(layers: Sequence[LoRALayer]) -> CoreSpace:
    """Build the Core Space of the layers of one module [arXiv:2509.17786].

    Args:
        layers: LoRA layers without Tucker cores.

    Returns:
        Bases and cores. p is the rank of the deltas concatenated along the inputs and q their rank concatenated along
        the outputs; both are at most the sum of the layers' ranks.
    """
    pairs = [scaled_factors(layer) for layer in layers]
    left, right = _output_basis(pairs), _output_basis([(down.T, up.T) for up, down in pairs]).T
    cores = torch.stack([(left.T @ up) @ (down @ right.T) for up, down in pairs])
    return CoreSpace(left=left, right=right, cores=cores, shape=_common_shape(layers))


def build_knots_space(layers: Sequence[LoRALayer]) -> CoreSpace:
    """Build the coordinates of KnOTS [arXiv:2410.19735]: U of [delta_1 ... delta_n] = U S [V_1^T ... V_n^T].

    Each core is S V_i^T = U^T delta_i (p, in * kh * kw), the layer's part of V multiplied by the singular values, as in
    all of the authors' settings. The dense deltas are never formed.

    Args:
        layers: LoRA layers without Tucker cores.
    """
    pairs = [scaled_factors(layer) for layer in layers]
    left = _output_basis(pairs)
    cores = torch.stack([(left.T @ up) @ down for up, down in pairs])
    return CoreSpace(left=left, right=None, cores=cores, shape=_common_shape(layers))


def layer_from_core(space: CoreSpace, core: Tensor) -> LoRALayer:
    """Build the layer whose delta is left @ core @ right.

    Args:
        space: The bases.
        core: Core (p, q).

    Returns:
        A layer of the numerical rank of the core, at least 1, with scale 1.
    """
    inner_left, values, inner_right = thin_svd(core)
    right = inner_right if space.right is None else inner_right @ space.right
    spectrum = Spectrum(
        left=(space.left @ inner_left).float(), values=values.float(), right=right.float(), shape=space.shape
    )
    return truncate_spectrum(spectrum, _count_significant(values))


def scaled_factors(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    """Return alpha / rank * up (out, rank) and down (rank, in * kh * kw) in float64."""
    return layer.scale * layer.up.double().flatten(1), layer.down.double().flatten(1)


def _output_basis(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the significant left singular vectors (out, p) of all up_i @ down_i, concatenated along the inputs.

    With down_i^T = Q R, the narrow matrix up_i @ R^T has the same left singular vectors and values as up_i @ down_i.
    """
    left, values, _ = thin_svd(torch.cat([up @ qr_factors(down.T)[1].T for up, down in pairs], dim=1))
    return left[:, : _count_significant(values)]


def _count_significant(values: Tensor) -> int:
    """Return the number of singular values above the rounding error, at least 1, as no layer has rank 0."""
    return max(1, int((values > _RELATIVE_ZERO * values[0]).sum()))


def _common_shape(layers: Sequence[LoRALayer]) -> tuple[int, ...]:
    return common_weight_shape([(1.0, layer) for layer in layers])
