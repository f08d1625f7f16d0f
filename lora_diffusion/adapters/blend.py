"""A blend: adapters with weights, summed as deltas.

    W' = W + sum_i weight_i * (alpha_i / rank_i) * up_i @ down_i

never an average of factors; other kinds of layer add their own delta in the same way. A DoRA layer's delta is what it
makes of the base's own weight, minus that weight, so that it too sums, in any order. Knows nothing of files or models.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.coefficients import Moment, coefficients, has_schedule, is_off
from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.architectures.families import family_title
from lora_diffusion.architectures.module_paths import Anatomy
from lora_diffusion.config.preset import BlendWeight, Region, Weight
from lora_diffusion.errors import ConfigError, FamilyMismatchError


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedAdapter:
    """An adapter and the user's weight for it: 0 is off, 1 as trained; negative and larger ones are allowed.

    Raises ConfigError for a weight that is not finite, or has a pattern that matches no module of the adapter.
    """

    adapter: Adapter
    weight: Weight = 1.0
    path: Path | None = None
    """Where its file was found; goes into recipes."""
    region: Region | None = None
    """The part of the picture that it acts in."""
    payload_hash: str = ""
    """SHA-256 of its file's bytes after the header, by which other programs know it."""

    def __post_init__(self) -> None:
        if not isinstance(self.weight, BlendWeight) and not math.isfinite(self.weight):
            raise ConfigError(f"weight {self.weight} of {self.name!r} is no finite number")
        patterns = self.weight.modules if isinstance(self.weight, BlendWeight) else ()
        for pattern, _ in patterns:
            if not any(fnmatchcase(path, pattern) for path in self.adapter.paths):
                raise ConfigError(f"{self.name}: the pattern {pattern!r} matches none of its modules")

    @property
    def name(self) -> str:
        """What to call it in messages and recipes."""
        return self.adapter.metadata.name or (self.path.stem if self.path else "adapter")

    @property
    def hash(self) -> str:
        """The adapter's content hash."""
        return self.adapter.hash


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
        entries = [e for e in self.entries if not is_off(e.weight)]
        if len(entries) < 2:  # a lone adapter needs no order, and its hash costs as much as a tenth of applying it
            return tuple(entries)
        return tuple(sorted(entries, key=lambda e: (e.hash, str(e.weight))))

    @property
    def is_scheduled(self) -> bool:
        """Whether it changes from step to step."""
        return any(has_schedule(e.weight) or e.adapter.metadata.least_rank for e in self.active)


Term = tuple[float, Layer]
"""A layer and its coefficient."""
BiasTerm = tuple[float, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlendSum:
    """What a blend comes to at one moment: the layers of each module, with their coefficients, none of which is 0."""

    layers: Mapping[str, tuple[Term, ...]]
    biases: Mapping[str, tuple[BiasTerm, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it changes, `<module path>.weight` and `.bias`."""
        return (*(f"{path}.weight" for path in self.layers), *(f"{path}.bias" for path in self.biases))


def blend_sum(blend: Blend, anatomy: Anatomy | None = None, moment: Moment | None = None) -> BlendSum:
    """The blend at one denoising step, or at all of them if none has a schedule.

    `anatomy` is the base's, needed for weights by block. Raises ConfigError for blocks that the base does not have, or
    a schedule without a moment, or a region, which weights cannot hold.
    """
    layers: dict[str, list[Term]] = {}
    biases: dict[str, list[BiasTerm]] = {}
    for entry in blend.active:
        if entry.region:
            raise ConfigError(f"{entry.name}: acts in a region, which only pictures have; `generate` blends by regions")
        adapter = entry.adapter
        own = layers_at(entry, moment)
        for path, coefficient in coefficients(entry.weight, adapter.paths, anatomy, moment).items():
            if coefficient != 0 and path in adapter.layers:
                layers.setdefault(path, []).append((coefficient, own[path]))
            if coefficient != 0 and path in adapter.biases:
                biases.setdefault(path, []).append((coefficient, adapter.biases[path]))
    return BlendSum(
        layers={path: tuple(terms) for path, terms in layers.items()},
        biases={path: tuple(terms) for path, terms in biases.items()},
    )


def layers_at(entry: WeightedAdapter, moment: Moment | None) -> Mapping[str, Layer]:
    """An adapter's layers at a denoising step: of a T-LoRA the directions that act there, of others all.

    Raises ConfigError for a T-LoRA where there are no steps.
    """
    adapter, least = entry.adapter, entry.adapter.metadata.least_rank
    if not least:
        return adapter.layers
    if moment is None:
        raise ConfigError(
            f"{entry.name}: is a T-LoRA, which changes with the timestep, so that no weights can hold it; blend it "
            "when pictures are made, or cut it to one rank with resize --first"
        )
    share = moment.step / moment.steps
    return {path: cut_layer(layer, least, share) for path, layer in adapter.layers.items()}


def cut_layer(layer: Layer, least: int, share: float) -> Layer:
    """The directions of a layer that act after a share of the steps; the same object for the same rank."""
    if not isinstance(layer, LoRALayer):
        return layer
    return first_directions_of(layer, timed_rank(share, least, layer.rank))


def timed_rank(share: float, least: int, rank: int) -> int:
    """How many directions of a T-LoRA act after a share of the way from noise to picture [arXiv:2507.05964]."""
    least = min(least, rank)
    return least + math.floor(share * (rank - least) + 1e-6)


CUTS: WeakKeyDictionary[LoRALayer, dict[int, LoRALayer]] = WeakKeyDictionary()
"""Layers that were cut, by rank, so that the same cut is the same object; they go when the layer goes."""


def first_directions_of(layer: LoRALayer, rank: int) -> LoRALayer:
    """A layer cut to its first directions, whose strength stays as it is."""
    if rank >= layer.rank:
        return layer
    known = CUTS.setdefault(layer, {})
    if rank not in known:
        up = layer.up[:, :rank].contiguous()
        known[rank] = LoRALayer(down=layer.down[:rank], up=up, alpha=layer.scale * rank)
    return known[rank]


def same_terms(first: object, second: object) -> bool:
    """Whether two nested tuples hold the same numbers and the very same layers and tensors."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        mine, other = cast("tuple[object, ...]", first), cast("tuple[object, ...]", second)
        return len(mine) == len(other) and all(map(same_terms, mine, other))
    return first is second or (isinstance(first, int | float) and first == second)


def joined_sums(sums: Iterable[BlendSum]) -> BlendSum:
    """The terms of several sums in one."""
    layers: dict[str, tuple[Term, ...]] = {}
    biases: dict[str, tuple[BiasTerm, ...]] = {}
    for total in sums:
        for path, terms in total.layers.items():
            layers[path] = (*layers.get(path, ()), *terms)
        for path, terms in total.biases.items():
            biases[path] = (*biases.get(path, ()), *terms)
    return BlendSum(layers=layers, biases=biases)


def part_of(total: BlendSum, keep: Callable[[str], bool]) -> BlendSum:
    """The terms at those module paths that are to be kept."""
    return BlendSum(
        layers={path: terms for path, terms in total.layers.items() if keep(path)},
        biases={path: terms for path, terms in total.biases.items() if keep(path)},
    )


def is_joinable(layer: Layer) -> bool:
    """Whether its factors can be stacked with others': plain LoRA, without a Tucker core."""
    return isinstance(layer, LoRALayer) and layer.mid is None


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """The factors of several LoRA layers of one module, side by side on one device; weights come later.

    `up` is (out, sum of ranks) in the type of the layers, `down` (sum of ranks, in) in float32, kernels flattened.
    Averaging factors instead of stacking them would add cross terms up_i @ down_j.
    """

    up: Tensor
    down: Tensor
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def weighted_up(self, terms: Sequence[Term]) -> Tensor:
        """`up` with each layer's columns times its scale and its coefficient in `terms`, float32."""
        factors = tuple(weight * scale for (weight, _), scale in zip(terms, self.scales, strict=True))
        return torch.mul(self.up, column_factors(factors, self.ranks, self.up.device)).float()


@functools.lru_cache(maxsize=16)
def column_factors(factors: tuple[float, ...], ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Each factor as often as its rank, float32; most modules of a blend ask for the very same ones."""
    return torch.tensor([value for value, rank in zip(factors, ranks, strict=True) for _ in range(rank)], device=device)


def stacked(layers: Sequence[Layer], device: torch.device | None = None) -> Stack:
    """Plain LoRA layers as one pair of factors. Raises ConfigError for a kind whose factors cannot be stacked."""
    plain = [layer for layer in layers if isinstance(layer, LoRALayer) and layer.mid is None]
    if len(plain) < len(layers):
        kinds = sorted({layer.kind for layer in layers if not is_joinable(layer)})
        raise ConfigError(f"{', '.join(kinds)} layers have no factors to stack; only plain LoRA combines exactly")
    ups, downs = [layer.up.flatten(1) for layer in plain], [layer.down.flatten(1) for layer in plain]
    if len({(tensor.dtype, tensor.device) for tensor in (*ups, *downs)}) > 1:
        ups, downs = ([tensor.to(device, torch.float32) for tensor in tensors] for tensors in (ups, downs))
    return Stack(
        up=(torch.cat(ups, dim=1) if len(ups) > 1 else ups[0]).to(device),
        down=(torch.cat(downs, dim=0) if len(downs) > 1 else downs[0]).to(device, torch.float32),
        ranks=tuple(layer.rank for layer in plain),
        scales=tuple(layer.scale for layer in plain),
    )


def joined_layer(terms: Sequence[Term]) -> LoRALayer:
    """Weighted LoRA layers of one module as a single layer of scale 1 in float32: factors stacked, ranks added.

    Raises ConfigError for a kind whose factors cannot be stacked.
    """
    stack = stacked([layer for _, layer in terms])
    shape = joined_shape(terms)
    up = stack.weighted_up(terms)
    ones = [1] * len(shape[2:])
    rank = stack.down.shape[0]
    return LoRALayer(down=stack.down.reshape(rank, *shape[1:]), up=up.reshape(*up.shape, *ones), alpha=float(rank))


def parted(terms: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    """Those whose factors can be stacked, and the others."""
    return [term for term in terms if is_joinable(term[1])], [term for term in terms if not is_joinable(term[1])]


def term_deltas(terms: Sequence[Term], base: Tensor | None) -> list[Tensor]:
    """The weighted deltas of layers that cannot be stacked, on the base's device."""
    device = base.device if base is not None else None
    moved = [(w, x.with_factors({name: factor.to(device) for name, factor in x.factors.items()})) for w, x in terms]
    return [weight * layer.delta(base) for weight, layer in moved]


def delta_of(terms: Sequence[Term], base: Tensor | None = None) -> Tensor:
    """Sum of the weighted deltas at one module, float32, of the shape and on the device of the `base` weight.

    One product for all LoRA layers together. Without `base`, which DoRA needs, on the CPU in the layers' own shape.
    """
    joinable, others = parted(terms)
    deltas = term_deltas(others, base)
    if joinable:
        stack = stacked([layer for _, layer in joinable], base.device if base is not None else None)
        product = stack.weighted_up(joinable) @ stack.down
        deltas.insert(0, product.reshape(base.shape if base is not None else joined_shape(joinable)))
    shape = deltas[0].shape if base is None else base.shape
    return functools.reduce(torch.add, (delta.reshape(shape) for delta in deltas))


def joined_shape(terms: Sequence[Term]) -> tuple[int, ...]:
    return max((layer.weight_shape for _, layer in terms), key=len)


def blended_weight(
    base: Tensor, terms: Sequence[Term], *, stack: Stack | None = None, out: Tensor | None = None
) -> Tensor:
    """The base's weight plus the sum of the terms, in float32.

    All LoRA layers are one product, added to the base as it is computed; the other kinds' deltas follow one by one.
    `stack` holds the factors of the former, if they are at hand; `out`, float32 and not the base, is written to.
    """
    joinable, others = parted(terms)
    value = base.float()
    if out is None and value is not base:
        out = value  # a copy of our own already
    if joinable:
        stack = stack or stacked([layer for _, layer in joinable], base.device)
        up = stack.weighted_up(joinable)
        flat = None if out is None else out.view(up.shape[0], -1)
        value = torch.addmm(value.reshape(up.shape[0], -1), up, stack.down, out=flat).reshape(base.shape)
    for delta in term_deltas(others, base):
        value = torch.add(value, delta.reshape(base.shape), out=out)
    return value


def blended_bias(base: Tensor, terms: Sequence[BiasTerm]) -> Tensor:
    """The base's bias plus the weighted biases, in float32."""
    return functools.reduce(torch.add, (weight * bias.to(base.device).float() for weight, bias in terms), base.float())


def rounded(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The blended value in the base's type. Raises ConfigError if it does not fit into that."""
    check_range(value, dtype, name)
    return value.to(dtype)


def check_range(value: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ConfigError if a blended value does not fit into the base's type; its extremes tell, at half the cost."""
    if dtype == torch.float32:
        return
    extremes = torch.stack(torch.aminmax(value)).to(dtype)
    if not bool(extremes.isfinite().all()):
        raise ConfigError(f"{name}: the blended value is beyond the range of {dtype}; lower the weights")


def check_fits(
    blend: Blend, *, base_name: str, family: str, paths: frozenset[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise FamilyMismatchError unless everything in every adapter finds a tensor of its shape in the base.

    `paths` are the module paths of the base's family, `shapes` the parameters (`<module path>.weight` or `.bias`) that
    the blend would change.
    """
    for entry in blend.entries:
        adapter = entry.adapter
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
