"""Blends: weighted sums of adapter deltas, independent of file formats and models.

    W' = W + sum_i weight_i * (alpha_i / rank_i) * up_i @ down_i

The factors themselves are never averaged. Layers of other kinds add their own delta in the same way. The delta of a
DoRA layer is computed from the weight of the base, so that it too can be summed in any order.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar, cast

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.coefficients import DenoisingStep, coefficients, has_schedule, is_zero
from lora_diffusion.adapters.factor_stack import BiasTerm, Term
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.adapters.t_lora import truncate_at_step
from lora_diffusion.architectures.families import family_title
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.preset import BlendWeight, Region, Weight
from lora_diffusion.errors import ConfigError, FamilyMismatchError

_Source = TypeVar("_Source", bound=Adapter | str | os.PathLike[str])


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WeightedAdapter:
    """An adapter with its weight in a blend.

    Raises:
        ConfigError: If the weight is not finite, or has a module pattern that matches no module of the adapter.
    """

    adapter: Adapter
    weight: Weight = 1.0
    """0 turns the adapter off, 1 applies it as trained; negative values and values above 1 are allowed."""
    path: Path | None = None
    """File that it was loaded from; recorded in recipes."""
    region: Region | None = None
    """Part of the image that it acts in; None for the whole image."""
    payload_hash: str = ""
    """SHA-256 of the bytes after the header of its file, by which A1111 and kohya's scripts identify it."""

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))
        if not isinstance(self.weight, BlendWeight) and not math.isfinite(self.weight):
            raise ConfigError(f"the weight {self.weight} of {self.name!r} is not a finite number")
        patterns = self.weight.modules if isinstance(self.weight, BlendWeight) else ()
        for pattern, _ in patterns:
            if not any(fnmatchcase(path, pattern) for path in self.adapter.paths):
                raise ConfigError(f"{self.name}: the module pattern {pattern!r} matches no module of the adapter")

    def __repr__(self) -> str:
        """Describe the entry on one line, such as `WeightedAdapter(neon x 0.8)`."""
        return f"WeightedAdapter({_describe_entry(self)})"

    @property
    def name(self) -> str:
        """Name in messages and recipes: that of the metadata, else that of the file."""
        return self.adapter.metadata.name or (self.path.stem if self.path else "adapter")

    @property
    def hash(self) -> str:
        """Content hash of the adapter."""
        return self.adapter.hash


def _describe_entry(entry: WeightedAdapter) -> str:
    """Return `neon x 0.8`, with the names of further settings that change the weight: `neon x 0.8 (blocks, region)`."""
    weight = entry.weight if isinstance(entry.weight, BlendWeight) else BlendWeight(value=entry.weight)
    settings = [name for name in ("components", "blocks", "modules", "schedule") if getattr(weight, name)]
    settings += ["region"] if entry.region else []
    suffix = f" ({', '.join(settings)})" if settings else ""
    return f"{entry.name} x {weight.value:g}{suffix}"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Blend:
    """Any number of weighted adapters of one model family. An empty blend leaves the base unchanged.

    Raises:
        FamilyMismatchError: If the adapters belong to different families.
    """

    entries: tuple[WeightedAdapter, ...] = ()

    def __post_init__(self) -> None:
        families = sorted({e.adapter.metadata.family for e in self.entries if e.adapter.metadata.family})
        if len(families) > 1:
            titles = " and ".join(map(family_title, families))
            raise FamilyMismatchError(f"adapters of {titles} in one blend; use adapters of the same family")

    def __repr__(self) -> str:
        """Describe the blend on one line, such as `Blend(neon x 0.8, gloop x 0.5)`."""
        return f"Blend({', '.join(map(_describe_entry, self.entries))})"

    @classmethod
    def of(cls, weights: Mapping[_Source, Weight] | Iterable[tuple[_Source, Weight]]) -> Self:
        """Create a blend from adapters and paths of adapter files.

        Args:
            weights: Adapters, or paths of adapter files or PEFT folders, and their weights, as a mapping or as pairs.
                Pairs may name an adapter more than once.

        Returns:
            The blend, in the given order. Entries that were loaded from a path record it, as recipes need it.

        Raises:
            AdapterFormatError: If a file is not a valid adapter.
            ConfigError: If a weight is not finite.
            FamilyMismatchError: If the adapters belong to different families.

        Example:
            >>> Blend.of({"neon.safetensors": 0.8, gloop: 0.5})
            Blend(neon x 0.8, gloop x 0.5)
        """
        pairs = cast("Iterable[tuple[_Source, Weight]]", weights.items() if isinstance(weights, Mapping) else weights)
        return cls(entries=tuple(_weighted_adapter(source, weight) for source, weight in pairs))

    @cached_property
    def active(self) -> tuple[WeightedAdapter, ...]:
        """Entries whose weight is not 0, in an order that does not depend on the order of `entries`.

        Floating-point sums depend on the order of their terms; sorting by hash makes the result reproducible.
        """
        entries = [e for e in self.entries if not is_zero(e.weight)]
        if len(entries) < 2:  # nothing to sort, and the hash costs a tenth of the time that applying an adapter takes
            return tuple(entries)
        return tuple(sorted(entries, key=lambda e: (e.hash, str(e.weight))))

    @property
    def is_scheduled(self) -> bool:
        """Whether any coefficient or rank changes from one denoising step to the next."""
        return any(has_schedule(e.weight) or e.adapter.metadata.min_rank for e in self.active)


def _weighted_adapter(source: Adapter | str | os.PathLike[str], weight: Weight) -> WeightedAdapter:
    if isinstance(source, Adapter):
        return WeightedAdapter(adapter=source, weight=weight)
    # `formats` builds on this module; only blending by path needs it
    from lora_diffusion.formats.adapters.weighted import load_weighted_adapter

    return load_weighted_adapter(source, weight)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BlendSum:
    """The terms of a blend at one denoising step: layers and biases of each module with nonzero coefficients."""

    layers: Mapping[str, tuple[Term, ...]]
    """Weighted layers by module path."""
    biases: Mapping[str, tuple[BiasTerm, ...]]
    """Weighted biases by module path."""

    def __repr__(self) -> str:
        """Describe the sum on one line, without its tensors."""
        return f"BlendSum({len(self.layers)} weights, {len(self.biases)} biases)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that it changes: `<module path>.weight` and `<module path>.bias`."""
        return (*(f"{path}.weight" for path in self.layers), *(f"{path}.bias" for path in self.biases))


def blend_sum(blend: Blend, layout: ModelLayout | None = None, denoising_step: DenoisingStep | None = None) -> BlendSum:
    """Evaluate a blend at one denoising step.

    Args:
        blend: Blend without regions.
        layout: Layout of the base model, required for weights by block.
        denoising_step: Step to evaluate, required if the blend has a schedule or contains a T-LoRA.

    Raises:
        ConfigError: If an adapter is limited to a region, a block does not exist in the base, or `layout` or
            `denoising_step` is missing where it is required.
    """
    layers: dict[str, list[Term]] = {}
    biases: dict[str, list[BiasTerm]] = {}
    for entry in blend.active:
        if entry.region:
            raise ConfigError(
                f"{entry.name}: acts in a region of the image, which cannot be merged into weights; "
                "blend by region in `generate`"
            )
        adapter = entry.adapter
        step_layers = _layers_at_step(entry, denoising_step)
        for path, coefficient in coefficients(entry.weight, adapter.paths, layout, denoising_step).items():
            if coefficient != 0 and path in adapter.layers:
                layers.setdefault(path, []).append((coefficient, step_layers[path]))
            if coefficient != 0 and path in adapter.biases:
                biases.setdefault(path, []).append((coefficient, adapter.biases[path]))
    return BlendSum(
        layers={path: tuple(terms) for path, terms in layers.items()},
        biases={path: tuple(terms) for path, terms in biases.items()},
    )


def _layers_at_step(entry: WeightedAdapter, denoising_step: DenoisingStep | None) -> Mapping[str, Layer]:
    """Return the layers of an adapter at a denoising step; those of a T-LoRA are truncated to the rank that acts there.

    Raises:
        ConfigError: For a T-LoRA without a denoising step.
    """
    adapter, min_rank = entry.adapter, entry.adapter.metadata.min_rank
    if not min_rank:
        return adapter.layers
    if denoising_step is None:
        raise ConfigError(
            f"{entry.name}: is a T-LoRA, whose rank changes with the timestep, so it cannot be merged into weights; "
            "blend it in `generate`, or truncate it to one rank with resize --first"
        )
    progress = denoising_step.index / denoising_step.total
    return {path: truncate_at_step(layer, min_rank, progress) for path, layer in adapter.layers.items()}


def terms_equal(first: object, second: object) -> bool:
    """Return whether two nested tuples contain equal numbers and identical (the same object) layers and tensors."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        left, right = cast("tuple[object, ...]", first), cast("tuple[object, ...]", second)
        return len(left) == len(right) and all(map(terms_equal, left, right))
    return first is second or (isinstance(first, int | float) and first == second)


def merge_sums(sums: Iterable[BlendSum]) -> BlendSum:
    """Concatenate the terms of several sums."""
    layers: dict[str, tuple[Term, ...]] = {}
    biases: dict[str, tuple[BiasTerm, ...]] = {}
    for each in sums:
        for path, terms in each.layers.items():
            layers[path] = (*layers.get(path, ()), *terms)
        for path, terms in each.biases.items():
            biases[path] = (*biases.get(path, ()), *terms)
    return BlendSum(layers=layers, biases=biases)


def filter_modules(deltas: BlendSum, predicate: Callable[[str], bool]) -> BlendSum:
    """Return the terms of the modules whose path satisfies `predicate`."""
    return BlendSum(
        layers={path: terms for path, terms in deltas.layers.items() if predicate(path)},
        biases={path: terms for path, terms in deltas.biases.items() if predicate(path)},
    )
