"""A base with adapters in its weights for good, to train on top of them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.in_place import WeightPatch, memory_backup, validate_blend
from lora_diffusion.library.references import load_blend
from lora_diffusion.models.load import Base


def add_base_adapters(base: Base, weights: Mapping[Path, float]) -> Base:
    """The base with adapter files added, each at its weight; it has another hash then, as it is another base.

    Mutates the base's models. Raises ConfigError for a file that is not there, AdapterFormatError,
    FamilyMismatchError.
    """
    if not weights:
        return base
    blend: Blend = load_blend([BlendEntry(path=str(path), weight=weight) for path, weight in weights.items()]).blend
    for entry in blend.entries:
        if entry.adapter.tokens:
            raise ConfigError(
                f"on_top_of: {entry.name} has learned words ({', '.join(entry.adapter.tokens)}), which no weight of a "
                "base holds; leave it out"
            )
    validate_blend(base, blend)
    WeightPatch(base, memory_backup()).apply(blend)
    merged = tuple(f"{entry.adapter.hash} {entry.weight}" for entry in blend.entries)
    return replace(base, merged=(*base.merged, *merged))
