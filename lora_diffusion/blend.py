"""A blend: adapters with weights, summed as deltas.

    W' = W + sum_i weight_i * (alpha_i / rank_i) * up_i @ down_i

never an average of factors. Knows nothing of files or models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LoRALayer, adapter_hash
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.families import FAMILIES


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedAdapter:
    """An adapter and the user's weight for it: 0 is off, 1 as trained; negative and larger ones are allowed."""

    adapter: Adapter
    weight: float = 1.0

    @cached_property
    def hash(self) -> str:
        return adapter_hash(self.adapter)


@dataclass(frozen=True, kw_only=True, eq=False)
class Blend:
    """Any number of weighted adapters of one family. An empty blend is the base."""

    entries: tuple[WeightedAdapter, ...] = ()

    def __post_init__(self) -> None:
        families = sorted({e.adapter.metadata.family for e in self.entries if e.adapter.metadata.family})
        if len(families) > 1:
            titles = " and ".join(FAMILIES[f].title if f in FAMILIES else f for f in families)
            raise FamilyMismatchError(f"adapters of {titles} in one blend; use adapters that share a family")
        for entry in self.entries:
            if not torch.isfinite(torch.tensor(entry.weight)):
                raise ConfigError(f"weight {entry.weight} of {entry.adapter.metadata.name!r} is no finite number")

    @cached_property
    def active(self) -> tuple[WeightedAdapter, ...]:
        """Entries of weight other than 0, in an order of their own, so that the user's order changes no bit."""
        entries = (e for e in self.entries if e.weight != 0)
        return tuple(sorted(entries, key=lambda e: (e.hash, e.weight)))

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module path that the blend changes."""
        return tuple(sorted({path for entry in self.active for path in entry.adapter.layers}))

    @property
    def family(self) -> str:
        """The adapters' family, or an empty string if none of them names it."""
        return next((e.adapter.metadata.family for e in self.entries if e.adapter.metadata.family), "")


def blend_delta(blend: Blend, path: str) -> Tensor:
    """Sum of the weighted deltas at one module, float32, of the shape of its weight.

    One product of the concatenated factors, whatever the number of adapters.
    """
    layers = [(e.weight, e.adapter.layers[path]) for e in blend.active if path in e.adapter.layers]
    return weighted_delta(layers, path)


def weighted_delta(layers: Iterable[tuple[float, LoRALayer]], path: str) -> Tensor:
    pairs = list(layers)
    shapes = {layer.weight_shape for _, layer in pairs}
    if len(shapes) != 1:
        raise FamilyMismatchError(
            f"{path}: adapters for weights of different shapes, {sorted(shapes)}; use adapters of one base"
        )
    up = torch.cat([layer.up.float().flatten(1) * (weight * layer.scale) for weight, layer in pairs], dim=1)
    down = torch.cat([layer.down.float().flatten(1) for _, layer in pairs], dim=0)
    return (up @ down).reshape(shapes.pop())


def blended_weight(weight: Tensor, blend: Blend, path: str) -> Tensor:
    """The base's weight plus the blend's delta: computed in float32, rounded once to the weight's own type."""
    return (weight.float() + blend_delta(blend, path).to(weight.device)).to(weight.dtype)
