"""What the reader of a dialect hands over before it becomes an adapter, and what no file may hold in any dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_diffusion.adapters.adapter import Adapter, Token, named_tensors
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParsedFile:
    """A file's content in our words; together with `unmatched` it accounts for every key of the file."""

    dialect: str
    layers: Mapping[str, Layer] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Token] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    """Keys that are not understood, as the file spells them."""
    family: str = ""
    """The family that the keys were translated by, if that was needed."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""


def validate_adapter(adapter: Adapter, source: str) -> None:
    """Raise AdapterFormatError for an adapter that holds nothing, or NaN or infinity."""
    count = sum(1 for _ in named_tensors(adapter))
    if not count:
        raise AdapterFormatError(f"{source}: an adapter without layers; expected at least one pair of factors")
    broken = adapter.non_finite
    if broken:
        raise AdapterFormatError(
            f"{source}: {len(broken)} of {count} tensors hold NaN or infinity (first: {broken[0]}); "
            "the training that made it broke down, use an earlier file"
        )
