"""A blend: adapters with weights, summed as deltas.

    W' = W + sum_i weight_i * (alpha_i / rank_i) * up_i @ down_i

never an average of factors; other kinds of layer add their own delta in the same way. A DoRA layer's delta is what it
makes of the base's own weight, minus that weight, so that it too sums, in any order. Knows nothing of files or models.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import cast

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.coefficients import DenoisingStep, coefficients, has_schedule, is_zero
from lora_diffusion.adapters.factor_stack import BiasTerm, Term
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.adapters.t_lora import truncate_at_step
from lora_diffusion.architectures.families import family_title
from lora_diffusion.architectures.module_paths import ModelLayout
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
        entries = [e for e in self.entries if not is_zero(e.weight)]
        if len(entries) < 2:  # a lone adapter needs no order, and its hash costs as much as a tenth of applying it
            return tuple(entries)
        return tuple(sorted(entries, key=lambda e: (e.hash, str(e.weight))))

    @property
    def is_scheduled(self) -> bool:
        """Whether it changes from step to step."""
        return any(has_schedule(e.weight) or e.adapter.metadata.least_rank for e in self.active)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlendSum:
    """What a blend comes to at one moment: the layers of each module, with their coefficients, none of which is 0."""

    layers: Mapping[str, tuple[Term, ...]]
    biases: Mapping[str, tuple[BiasTerm, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it changes, `<module path>.weight` and `.bias`."""
        return (*(f"{path}.weight" for path in self.layers), *(f"{path}.bias" for path in self.biases))


def blend_sum(blend: Blend, layout: ModelLayout | None = None, denoising_step: DenoisingStep | None = None) -> BlendSum:
    """The blend at one denoising step, or at all of them if none has a schedule.

    `layout` is the base's, needed for weights by block. Raises ConfigError for blocks that the base does not have, or
    a schedule without a moment, or a region, which weights cannot hold.
    """
    layers: dict[str, list[Term]] = {}
    biases: dict[str, list[BiasTerm]] = {}
    for entry in blend.active:
        if entry.region:
            raise ConfigError(f"{entry.name}: acts in a region, which only pictures have; `generate` blends by regions")
        adapter = entry.adapter
        own = layers_at(entry, denoising_step)
        for path, coefficient in coefficients(entry.weight, adapter.paths, layout, denoising_step).items():
            if coefficient != 0 and path in adapter.layers:
                layers.setdefault(path, []).append((coefficient, own[path]))
            if coefficient != 0 and path in adapter.biases:
                biases.setdefault(path, []).append((coefficient, adapter.biases[path]))
    return BlendSum(
        layers={path: tuple(terms) for path, terms in layers.items()},
        biases={path: tuple(terms) for path, terms in biases.items()},
    )


def layers_at(entry: WeightedAdapter, denoising_step: DenoisingStep | None) -> Mapping[str, Layer]:
    """An adapter's layers at a denoising step: of a T-LoRA the directions that act there, of others all.

    Raises ConfigError for a T-LoRA where there are no steps.
    """
    adapter, least = entry.adapter, entry.adapter.metadata.least_rank
    if not least:
        return adapter.layers
    if denoising_step is None:
        raise ConfigError(
            f"{entry.name}: is a T-LoRA, which changes with the timestep, so that no weights can hold it; blend it "
            "when pictures are made, or cut it to one rank with resize --first"
        )
    share = denoising_step.index / denoising_step.total
    return {path: truncate_at_step(layer, least, share) for path, layer in adapter.layers.items()}


def terms_equal(first: object, second: object) -> bool:
    """Whether two nested tuples hold the same numbers and the very same layers and tensors."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        mine, other = cast("tuple[object, ...]", first), cast("tuple[object, ...]", second)
        return len(mine) == len(other) and all(map(terms_equal, mine, other))
    return first is second or (isinstance(first, int | float) and first == second)


def merge_sums(sums: Iterable[BlendSum]) -> BlendSum:
    """The terms of several sums in one."""
    layers: dict[str, tuple[Term, ...]] = {}
    biases: dict[str, tuple[BiasTerm, ...]] = {}
    for total in sums:
        for path, terms in total.layers.items():
            layers[path] = (*layers.get(path, ()), *terms)
        for path, terms in total.biases.items():
            biases[path] = (*biases.get(path, ()), *terms)
    return BlendSum(layers=layers, biases=biases)


def filter_modules(total: BlendSum, keep: Callable[[str], bool]) -> BlendSum:
    """The terms at those module paths that are to be kept."""
    return BlendSum(
        layers={path: terms for path, terms in total.layers.items() if keep(path)},
        biases={path: terms for path, terms in total.biases.items() if keep(path)},
    )
