"""Adapters with their smallest numbers set to zero: those of the factors, or those of the deltas."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.factor_stack import is_joinable
from lora_diffusion.adapters.layers import FullLayer, Layer, LoRALayer
from lora_diffusion.algebra.metrics.norms import delta_norm
from lora_diffusion.algebra.metrics.quantization_error import delta_difference_norm
from lora_diffusion.errors import ConfigError

Scope: TypeAlias = Literal["module", "adapter"]
"""Where the share is counted: in every module by itself, or over the whole adapter at once.

By `module` every module keeps the same share, so that none is emptied; that is the default, because a small delta is
not an idle one: norms of different modules say little of what they do to a picture. By `adapter` the error over all
deltas together is smaller for the same share, at the cost of the modules with small deltas.
"""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How many numbers of the layers are not zero, and what was lost at each module."""

    nonzeros: int
    entries: int
    norms: Mapping[str, float]
    """Frobenius norm of the unpruned delta, by module path."""
    lost: Mapping[str, float]
    """Frobenius norm of what is missing from it."""

    @property
    def share(self) -> float:
        return self.nonzeros / self.entries

    @property
    def error(self) -> float:
        """Norm of all that is lost over the norm of all deltas."""
        return self.error_over(self.norms)

    def error_over(self, paths: Iterable[str]) -> float:
        """The same over some of the modules; 0 where there is no delta to lose."""
        pairs = [(self.lost[path], self.norms[path]) for path in paths]
        lost, total = (math.hypot(*values) for values in zip(*pairs, strict=True))
        return lost / total if total else 0.0


def prune_factors(adapter: Adapter, keep: float, scope: Scope = "module") -> Adapter:
    """The same LoRA, of the same shapes, types and alphas, with a share `keep` of the entries of up and down left.

    An entry counts by what setting it alone to zero takes from the delta, in the Frobenius norm: its size times the
    norm of the row of down (for an entry of up) or column of up (for one of down) that it is multiplied with. So the
    threshold means the same on both sides, however a trainer spread the size over the two. Exactly
    round(keep * entries) are kept; entries that are zero already count as kept only after all others. Biases and
    learned words stay. A safetensors file takes no fewer bytes for zeros; an archive of it does. Raises ConfigError
    for a share outside (0, 1] and for layers other than plain LoRA.
    """
    scores: dict[str, list[Tensor]] = {}
    for path, layer in adapter.layers.items():
        if not isinstance(layer, LoRALayer) or not is_joinable(layer):
            raise ConfigError(
                f"{path}: is {describe_kind(layer)}, which has no pair of factors to prune; prune the delta"
            )
        scores[path] = score_factors(layer)
    masks = select_highest(scores, keep, scope)
    layers = {
        path: layer.with_factors(
            {"up": apply_mask(layer.factors["up"], up), "down": apply_mask(layer.factors["down"], down)}
        )
        for path, layer in adapter.layers.items()
        for up, down in (masks[path],)
    }
    return replace(adapter, layers=layers)


def prune_deltas(adapter: Adapter, keep: float, scope: Scope = "module") -> Adapter:
    """Every layer as a full difference, float32, with a share `keep` of the entries of the deltas left: the largest.

    Any kind but DoRA, whose delta depends on the base. A pruned delta is no longer low-rank and a full layer is stored
    dense, zeros included: it takes out * in numbers, tens of times those of the factors, whatever `keep` is. It is for
    what works on whole deltas (trimming before a merge, study), not for smaller files. Biases and learned words stay.
    Raises ConfigError for a share outside (0, 1] and for DoRA.
    """
    for path, layer in adapter.layers.items():
        if layer.kind == "DoRA":
            raise ConfigError(f"{path}: is DoRA, whose delta depends on the base; merge it and extract a LoRA first")
    deltas = {path: layer.delta() for path, layer in adapter.layers.items()}
    masks = select_highest({path: [delta.abs()] for path, delta in deltas.items()}, keep, scope)
    layers = {path: FullLayer(diff=apply_mask(delta, masks[path][0])) for path, delta in deltas.items()}
    return replace(adapter, layers=layers)


def measure_sparsity(before: Adapter, after: Adapter) -> Sparsity:
    """What pruning, and rounding if the types differ, left of an adapter's layers."""
    factors = [factor for layer in after.layers.values() for factor in layer.factors.values()]
    return Sparsity(
        nonzeros=sum(int(factor.count_nonzero()) for factor in factors),
        entries=sum(factor.numel() for factor in factors),
        norms={path: delta_norm(layer) or 0.0 for path, layer in before.layers.items()},
        lost={path: delta_difference_norm(layer, after.layers[path]) for path, layer in before.layers.items()},
    )


def score_factors(layer: LoRALayer) -> list[Tensor]:
    """What each entry of up and of down is worth to the delta, in their shapes, float32."""
    up, down = layer.up.float(), layer.down.float()
    columns, rows = up.flatten(1).square().sum(0).sqrt(), down.flatten(1).square().sum(1).sqrt()
    size = abs(layer.scale)
    return [
        size * up.abs() * rows.reshape(1, -1, *[1] * (up.ndim - 2)),
        size * down.abs() * columns.reshape(-1, *[1] * (down.ndim - 1)),
    ]


def select_highest(scores: Mapping[str, list[Tensor]], keep: float, scope: Scope) -> dict[str, list[Tensor]]:
    """Masks of the entries with the highest scores, a share of those of each module or of all.

    Raises ConfigError for a share outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep {keep:g}: expected a share of the entries above 0 and at most 1")
    if scope == "module":
        return {path: highest_masks(parts, keep) for path, parts in scores.items()}
    masks = iter(highest_masks([part for parts in scores.values() for part in parts], keep))
    return {path: [next(masks) for _ in parts] for path, parts in scores.items()}


def highest_masks(parts: list[Tensor], keep: float) -> list[Tensor]:
    """A mask for each part; together they have round(keep * entries) places."""
    flat = torch.cat([part.flatten() for part in parts])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(round(keep * flat.numel()), sorted=False).indices] = True
    pieces = torch.split(mask, [part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.where(mask, torch.zeros_like(tensor))


def describe_kind(layer: Layer) -> str:
    return "LoRA with a Tucker core" if isinstance(layer, LoRALayer) else f"a {layer.kind} layer"
