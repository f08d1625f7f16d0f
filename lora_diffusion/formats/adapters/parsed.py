"""What the reader of a dialect hands over, before it is checked and becomes an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_diffusion.adapters.adapter import Token
from lora_diffusion.adapters.layers import Layer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Found:
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
