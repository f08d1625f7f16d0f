"""Merge adapters into a base before a new adapter is trained on top of it (kohya's `base_weights`)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.in_place import WeightPatch, memory_backup, validate_blend
from lora_diffusion.library.references import load_blend
from lora_diffusion.models.load import Base


def add_base_adapters(base: Base, weights: Mapping[Path, float] | Mapping[str, float]) -> Base:
    """Merge adapter files into the weights of a base for good.

    The models of `base` are changed in place. The returned base records the merged adapters, so its hash differs from
    the hash of the original base.

    Args:
        base: The base to change.
        weights: Adapter file -> weight at which it is merged. If empty, `base` is returned as it is.

    Raises:
        ConfigError: If a file does not exist or contains textual-inversion embeddings.
        AdapterFormatError: If a file cannot be read as an adapter.
        FamilyMismatchError: If an adapter was made for another model family.
    """
    if not weights:
        return base
    blend: Blend = load_blend([BlendEntry(path=str(path), weight=weight) for path, weight in weights.items()]).blend
    for entry in blend.entries:
        if entry.adapter.tokens:
            raise ConfigError(
                f"base_adapters: {entry.name} contains textual-inversion embeddings "
                f"({', '.join(entry.adapter.tokens)}), which cannot be merged into the weights of a base; "
                "remove it from base_adapters"
            )
    validate_blend(base, blend)
    WeightPatch(base, memory_backup()).apply(blend)
    merged = tuple(f"{entry.adapter.hash} {entry.weight}" for entry in blend.entries)
    return replace(base, merged=(*base.merged, *merged))
