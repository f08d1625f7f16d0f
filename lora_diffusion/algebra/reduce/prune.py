"""Prune an adapter: set the least important entries of its factors, or of its deltas, to zero."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.factor_stack import is_joinable
from lora_diffusion.adapters.layers import FullLayer, Layer, LoRALayer
from lora_diffusion.algebra.metrics.norms import delta_norm
from lora_diffusion.algebra.metrics.rounding_error import delta_difference_norm
from lora_diffusion.config.adapter_files import PruneScope
from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Sparsity and error of a pruned adapter."""

    nonzeros: int
    """Number of nonzero entries of all factors."""
    entries: int
    """Number of entries of all factors."""
    norms: Mapping[str, float]
    """Frobenius norm of the delta before pruning, by module path."""
    lost: Mapping[str, float]
    """Frobenius norm of the difference of the deltas before and after pruning, by module path."""

    @property
    def share(self) -> float:
        """Fraction of entries that are not zero."""
        return self.nonzeros / self.entries

    @property
    def error(self) -> float:
        """Relative error: Frobenius norm of all differences over that of all deltas."""
        return self.error_over(self.norms)

    def error_over(self, paths: Iterable[str]) -> float:
        """Return the relative error over some of the modules, at least one; 0 if their deltas are 0."""
        pairs = [(self.lost[path], self.norms[path]) for path in paths]
        lost, norm = (math.hypot(*values) for values in zip(*pairs, strict=True))
        return lost / norm if norm else 0.0


def prune_factors(adapter: Adapter, keep: float, scope: PruneScope = "module") -> Adapter:
    """Set the least important entries of `up` and `down` to zero.

    The importance of an entry is the Frobenius norm of the change of the delta if only this entry is set to zero: its
    magnitude times the norm of the row of `down` (for an entry of `up`) or column of `up` (for an entry of `down`) that
    it is multiplied by. The threshold thus means the same in both factors, however their scales are balanced.

    Exactly round(keep * entries) entries are kept; entries that are already zero have the lowest importance. A
    safetensors file does not become smaller, but it compresses better.

    Args:
        adapter: Adapter of plain LoRA layers.
        keep: Fraction of entries to keep, above 0 and at most 1.
        scope: Whether entries compete within their module or within the adapter.

    Returns:
        An adapter with the same shapes, dtypes, alphas, biases and textual inversion tokens.

    Raises:
        ConfigError: If `keep` is out of range or a layer is not plain LoRA.
    """
    scores: dict[str, list[Tensor]] = {}
    for path, layer in adapter.layers.items():
        if not isinstance(layer, LoRALayer) or not is_joinable(layer):
            raise ConfigError(
                f"{path}: is {_describe_kind(layer)}; only the factors of plain LoRA can be pruned, prune the delta "
                "instead"
            )
        scores[path] = _score_factors(layer)
    masks = _select_highest(scores, keep, scope)
    layers = {
        path: layer.with_factors(
            {"up": _apply_mask(layer.factors["up"], up), "down": _apply_mask(layer.factors["down"], down)}
        )
        for path, layer in adapter.layers.items()
        for up, down in (masks[path],)
    }
    return replace(adapter, layers=layers)


def prune_deltas(adapter: Adapter, keep: float, scope: PruneScope = "module") -> Adapter:
    """Set the smallest entries of each delta to zero and return the deltas as full differences in float32.

    Works for all kinds of layers except DoRA, whose delta depends on the base. A pruned delta is no longer low-rank,
    and full layers are stored densely: whatever `keep` is, the file has out * in numbers per module, tens of times as
    many as the factors. Use it to work on dense deltas, for example to trim before a merge, not to make files smaller.

    Args:
        adapter: Adapter without DoRA layers.
        keep: Fraction of entries to keep, above 0 and at most 1; the largest magnitudes are kept.
        scope: Whether entries compete within their module or within the adapter.

    Returns:
        An adapter of full layers with the same biases and textual inversion tokens.

    Raises:
        ConfigError: If `keep` is out of range or a layer is DoRA.
    """
    for path, layer in adapter.layers.items():
        if layer.kind == "DoRA":
            raise ConfigError(
                f"{path}: is DoRA, whose delta depends on the base weight; merge it and extract a LoRA first"
            )
    deltas = {path: layer.delta() for path, layer in adapter.layers.items()}
    masks = _select_highest({path: [delta.abs()] for path, delta in deltas.items()}, keep, scope)
    layers = {path: FullLayer(diff=_apply_mask(delta, masks[path][0])) for path, delta in deltas.items()}
    return replace(adapter, layers=layers)


def measure_sparsity(before: Adapter, after: Adapter) -> Sparsity:
    """Compare an adapter before and after pruning.

    Args:
        before: The original adapter.
        after: The pruned adapter; if it was cast to another dtype, the errors include rounding.
    """
    factors = [factor for layer in after.layers.values() for factor in layer.factors.values()]
    return Sparsity(
        nonzeros=sum(int(factor.count_nonzero()) for factor in factors),
        entries=sum(factor.numel() for factor in factors),
        norms={path: delta_norm(layer) or 0.0 for path, layer in before.layers.items()},
        lost={path: delta_difference_norm(layer, after.layers[path]) for path, layer in before.layers.items()},
    )


def _score_factors(layer: LoRALayer) -> list[Tensor]:
    """Return the importance of each entry of `up` and `down`, in their shapes, float32."""
    up, down = layer.up.float(), layer.down.float()
    column_norms, row_norms = up.flatten(1).square().sum(0).sqrt(), down.flatten(1).square().sum(1).sqrt()
    scale = abs(layer.scale)
    return [
        scale * up.abs() * row_norms.reshape(1, -1, *[1] * (up.ndim - 2)),
        scale * down.abs() * column_norms.reshape(-1, *[1] * (down.ndim - 1)),
    ]


def _select_highest(scores: Mapping[str, list[Tensor]], keep: float, scope: PruneScope) -> dict[str, list[Tensor]]:
    """Return masks of the highest-scoring fraction `keep` of the entries of each module, or of the whole adapter.

    Raises ConfigError if `keep` is out of range.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep:g}; expected a fraction of the entries above 0 and at most 1")
    if scope == "module":
        return {path: _highest_masks(parts, keep) for path, parts in scores.items()}
    masks = iter(_highest_masks([part for parts in scores.values() for part in parts], keep))
    return {path: [next(masks) for _ in parts] for path, parts in scores.items()}


def _highest_masks(parts: list[Tensor], keep: float) -> list[Tensor]:
    """Return a mask for each tensor of scores; together they select round(keep * entries) entries."""
    flat = torch.cat([part.flatten() for part in parts])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(round(keep * flat.numel()), sorted=False).indices] = True
    pieces = torch.split(mask, [part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.where(mask, torch.zeros_like(tensor))


def _describe_kind(layer: Layer) -> str:
    return "LoRA with a Tucker core" if isinstance(layer, LoRALayer) else f"a {layer.kind} layer"
