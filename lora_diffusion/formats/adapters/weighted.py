"""Load an adapter file as an entry of a blend."""

import os
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.adapters.blend import WeightedAdapter
from lora_diffusion.config.preset import Region, Weight
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.safetensors import file_payload_hash


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
