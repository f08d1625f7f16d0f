"""A blend: adapters with weights, summed as deltas.

    W' = W + sum_i weight_i * (alpha_i / rank_i) * up_i @ down_i

never an average of factors; other kinds of layer add their own delta in the same way. A DoRA layer's delta is what it
makes of the base's own weight, minus that weight, so that it too sums, in any order. Knows nothing of files or models.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.adapter import Adapter, adapter_hash
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.families import family_title
from lora_diffusion.layers import Layer, LoRALayer


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
        """Every module path whose weight the blend changes."""
        return tuple(sorted({path for entry in self.active for path in entry.adapter.layers}))

    @property
    def bias_paths(self) -> tuple[str, ...]:
        """Every module path whose bias the blend changes."""
        return tuple(sorted({path for entry in self.active for path in entry.adapter.biases}))


def weighted_layers(blend: Blend, path: str) -> list[tuple[float, Layer]]:
    """The layers at one module, with the weights of their adapters."""
    return [(e.weight, e.adapter.layers[path]) for e in blend.active if path in e.adapter.layers]


def is_joinable(layer: Layer) -> bool:
    """Whether its factors can be stacked with others': plain LoRA, without a Tucker core."""
    return isinstance(layer, LoRALayer) and layer.mid is None


def joined_layer(layers: Sequence[tuple[float, Layer]], device: torch.device | None = None) -> LoRALayer:
    """Weighted LoRA layers of one module as a single layer of scale 1 in float32: factors stacked, ranks added.

    Weights and scales go into `up` once; averaging factors instead would add cross terms up_i @ down_j. Raises
    ConfigError for a kind whose factors cannot be stacked.
    """
    pairs = [(weight, layer) for weight, layer in layers if isinstance(layer, LoRALayer) and layer.mid is None]
    if len(pairs) < len(layers):
        kinds = sorted({layer.kind for _, layer in layers if not is_joinable(layer)})
        raise ConfigError(f"{', '.join(kinds)} layers have no factors to stack; only plain LoRA combines exactly")
    shape = max((layer.weight_shape for _, layer in pairs), key=len)
    up = torch.cat([layer.up.to(device).float().flatten(1) * (w * layer.scale) for w, layer in pairs], dim=1)
    down = torch.cat([layer.down.to(device).float().flatten(1) for _, layer in pairs], dim=0)
    ones = [1] * len(shape[2:])
    return LoRALayer(down=down.reshape(-1, *shape[1:]), up=up.reshape(*up.shape, *ones), alpha=float(down.shape[0]))


def blend_delta(blend: Blend, path: str, base: Tensor | None = None) -> Tensor:
    """Sum of the weighted deltas at one module, float32, of the shape and on the device of the `base` weight.

    One product for all LoRA layers together. Without `base`, which DoRA needs, on the CPU in the layers' own shape.
    """
    layers = weighted_layers(blend, path)
    device = base.device if base is not None else None
    stacked = [pair for pair in layers if is_joinable(pair[1])]
    deltas = [joined_layer(stacked, device).delta()] if stacked else []
    for weight, layer in layers:
        if not is_joinable(layer):
            moved = layer.with_factors({name: factor.to(device) for name, factor in layer.factors.items()})
            deltas.append(weight * moved.delta(base))
    shape = deltas[0].shape if base is None else base.shape
    return functools.reduce(torch.add, (delta.reshape(shape) for delta in deltas))


def blend_bias(blend: Blend, path: str, base: Tensor) -> Tensor:
    """Sum of what the blend adds to one module's bias, float32, on the device of the `base` bias."""
    found = [(e.weight, e.adapter.biases[path]) for e in blend.active if path in e.adapter.biases]
    return functools.reduce(torch.add, (weight * bias.to(base.device).float() for weight, bias in found))


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
    """Raise FamilyMismatchError unless everything in every adapter finds a tensor of its shape in the base.

    `paths` are the module paths of the base's family, `shapes` the parameters (`<module path>.weight` or `.bias`) that
    the blend would change. Raises ConfigError for learned tokens, which no picture shows yet.
    """
    for entry in blend.entries:
        adapter = entry.adapter
        if adapter.tokens:
            raise ConfigError(
                f"{entry.name} holds learned tokens ({', '.join(adapter.tokens)}), which no base takes up yet; "
                "`lora-diffusion convert --without-tokens` makes a file of its layers alone"
            )
        check_family(adapter.metadata.family, entry.name, base_name=base_name, family=family)
        wanted = wanted_shapes(adapter)
        unknown = [name for name in wanted if name.rpartition(".")[0] not in paths or name not in shapes]
        if unknown:
            raise FamilyMismatchError(
                f"{entry.name}: {len(unknown)} of {len(wanted)} layers match no module of {base_name} "
                f"({family_title(family)}; first: {unknown[0]}); use the base that it was trained on"
            )
        for name, shape in wanted.items():
            if not same_weight(shape, shapes[name]):
                raise FamilyMismatchError(
                    f"{entry.name}: {name} is for a weight of shape {shape}, but {base_name} has {shapes[name]} there; "
                    "use the base that it was trained on"
                )


def check_family(own: str, name: str, *, base_name: str, family: str) -> None:
    """Raise FamilyMismatchError if an adapter's family is known and not the base's."""
    if own and own != family:
        raise FamilyMismatchError(
            f"{name} is an adapter for {family_title(own)}, but {base_name} is {family_title(family)}; "
            "use a base of its family"
        )


def wanted_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The parameters that an adapter changes, `<module path>.weight` and `.bias`, with the shapes it expects."""
    weights = {f"{path}.weight": layer.weight_shape for path, layer in adapter.layers.items()}
    return weights | {f"{path}.bias": tuple(bias.shape) for path, bias in adapter.biases.items()}


def same_weight(layer: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a layer's delta is that of the weight, be it with the kernel flattened or a 1x1 kernel left out."""
    return layer == weight or (layer[:1] == weight[:1] and math.prod(layer) == math.prod(weight) and len(weight) > 1)
