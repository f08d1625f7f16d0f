"""A blend: adapters with weights, summed as deltas.

    W' = W + sum_i weight_i * (alpha_i / rank_i) * up_i @ down_i

never an average of factors. Knows nothing of files or models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, LoRALayer, adapter_hash
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.families import family_title


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedAdapter:
    """An adapter and the user's weight for it: 0 is off, 1 as trained; negative and larger ones are allowed.

    Raises ConfigError for a weight that is not finite.
    """

    adapter: Adapter
    weight: float = 1.0
    path: Path | None = None
    """Where its file was found; goes into recipes."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"weight {self.weight} of {self.name!r} is no finite number")

    @property
    def name(self) -> str:
        """What to call it in messages and recipes."""
        return self.adapter.metadata.name or (self.path.stem if self.path else "adapter")

    @cached_property
    def hash(self) -> str:
        """The adapter's content hash."""
        return adapter_hash(self.adapter)


@dataclass(frozen=True, kw_only=True, eq=False)
class Blend:
    """Any number of weighted adapters of one family. An empty blend is the base.

    Raises FamilyMismatchError for adapters of different families.
    """

    entries: tuple[WeightedAdapter, ...] = ()

    def __post_init__(self) -> None:
        families = sorted({e.adapter.metadata.family for e in self.entries if e.adapter.metadata.family})
        if len(families) > 1:
            titles = " and ".join(map(family_title, families))
            raise FamilyMismatchError(f"adapters of {titles} in one blend; use adapters that share a family")

    @cached_property
    def active(self) -> tuple[WeightedAdapter, ...]:
        """Entries of weight other than 0, in an order of their own, so that the user's order changes no bit."""
        entries = (e for e in self.entries if e.weight != 0)
        return tuple(sorted(entries, key=lambda e: (e.hash, e.weight)))

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module path that the blend changes."""
        return tuple(sorted({path for entry in self.active for path in entry.adapter.layers}))


def joined_layer(blend: Blend, path: str, device: torch.device | None = None) -> LoRALayer:
    """The blend at one module as a single layer of scale 1 in float32: the factors joined, the ranks added.

    Weights and scales go into `up` once; averaging factors instead would add cross terms up_i @ down_j.
    """
    pairs = [(e.weight, e.adapter.layers[path]) for e in blend.active if path in e.adapter.layers]
    up = torch.cat([layer.up.to(device).float() * (weight * layer.scale) for weight, layer in pairs], dim=1)
    down = torch.cat([layer.down.to(device).float() for _, layer in pairs], dim=0)
    return LoRALayer(down=down, up=up, alpha=float(down.shape[0]))


def blend_delta(blend: Blend, path: str, device: torch.device | None = None) -> Tensor:
    """Sum of the weighted deltas at one module, float32, of the shape of its weight: one product for all adapters."""
    return joined_layer(blend, path, device).delta()


def blended_weight(weight: Tensor, delta: Tensor, path: str, dtype: torch.dtype | None = None) -> Tensor:
    """The base's weight plus the blend's delta: computed in float32, rounded once to `dtype` (the weight's own).

    Raises ConfigError if the result does not fit into that type.
    """
    value = (weight.float() + delta).to(dtype or weight.dtype)
    if not bool(value.isfinite().all()):
        raise ConfigError(f"{path}: the blended weight is beyond the range of {value.dtype}; lower the weights")
    return value


def check_fits(
    blend: Blend, *, base_name: str, family: str, paths: frozenset[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise FamilyMismatchError unless every layer of every adapter finds a weight of its shape in the base.

    `paths` are the module paths of the base's family, `shapes` the weights that the blend would change.
    """
    for entry in blend.entries:
        adapter, own = entry.adapter, entry.adapter.metadata.family
        if own and own != family:
            raise FamilyMismatchError(
                f"{entry.name} is an adapter for {family_title(own)}, but {base_name} is {family_title(family)}; "
                "use a base of its family"
            )
        unknown = [path for path in adapter.layers if path not in paths or path not in shapes]
        if unknown:
            raise FamilyMismatchError(
                f"{entry.name}: {len(unknown)} of {len(adapter.layers)} layers match no module of {base_name} "
                f"({family_title(family)}; first: {unknown[0]}); use the base that it was trained on"
            )
        for path, layer in adapter.layers.items():
            if layer.weight_shape != shapes[path]:
                raise FamilyMismatchError(
                    f"{entry.name}: {path} is for a weight of shape {layer.weight_shape}, but {base_name} has "
                    f"{shapes[path]} there; use the base that it was trained on"
                )
