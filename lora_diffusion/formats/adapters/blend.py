"""Create a blend from adapters and paths of adapter files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.preset import Region, Weight
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.safetensors import file_payload_hash

Source = TypeVar("Source", bound=Adapter | str | os.PathLike[str])


def blend_adapters(weights: Mapping[Source, Weight] | Iterable[tuple[Source, Weight]]) -> Blend:
    """Create a blend from adapters and paths of adapter files.

    Args:
        weights: Adapters, or paths of adapter files or PEFT folders, and their weights, as a mapping or as pairs.

    Returns:
        The blend, in the given order. Entries that were loaded from a path record it, as recipes need it.

    Raises:
        AdapterFormatError: If a file is not a valid adapter.
        ConfigError: If a weight is not finite.
        FamilyMismatchError: If the adapters belong to different families.

    Example:
        >>> blend_adapters({"neon.safetensors": 0.8, gloop: 0.5})
        Blend(neon x 0.8, gloop x 0.5)
    """
    pairs = cast("Iterable[tuple[Source, Weight]]", weights.items() if isinstance(weights, Mapping) else weights)
    return Blend(entries=tuple(_weighted_adapter(source, weight) for source, weight in pairs))


def _weighted_adapter(source: Adapter | str | os.PathLike[str], weight: Weight) -> WeightedAdapter:
    if isinstance(source, Adapter):
        return WeightedAdapter(adapter=source, weight=weight)
    return load_weighted_adapter(source, weight)


def load_weighted_adapter(
    path: str | os.PathLike[str], weight: Weight, *, region: Region | None = None, ignore: Sequence[str] = ()
) -> WeightedAdapter:
    """Load an adapter as an entry of a blend that records its path and payload hash, as recipes need them.

    Args:
        path: As in `load_adapter`.
        weight: The weight in the blend.
        region: The part of the image that the adapter is limited to.
        ignore: As in `load_adapter`.

    Raises:
        AdapterFormatError: If the file is not a valid adapter.
        ConfigError: If the weight is not finite.
    """
    path = Path(path)
    return WeightedAdapter(
        adapter=load_adapter(path, ignore=ignore),
        weight=weight,
        path=path,
        region=region,
        payload_hash=file_payload_hash(path) if path.suffix == ".safetensors" and path.is_file() else "",
    )
