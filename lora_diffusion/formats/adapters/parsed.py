"""Define the result of parsing an adapter file, and the checks that apply to all formats."""

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
    """The content of an adapter file by module path. Every key of the file was used or is in `unmatched`."""

    dialect: str
    """Name of the file format, as in `AdapterMetadata.source_format`."""
    layers: Mapping[str, Layer] = field(default_factory=dict[str, Layer], repr=False)
    """Layers by module path."""
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"], repr=False)
    """Bias deltas of shape (out,), by module path."""
    tokens: Mapping[str, Token] = field(default_factory=dict[str, Token], repr=False)
    """Textual-inversion embeddings by name."""
    unmatched: tuple[str, ...] = ()
    """Keys of the file that were not recognized."""
    family: str = ""
    """The family whose module names were used to convert the keys; empty if none was needed or it is ambiguous."""
    notes: tuple[str, ...] = ()
    """Assumptions that were made, as sentences for the user."""


def validate_adapter(adapter: Adapter, source: str) -> None:
    """Check that an adapter is not empty and that all values are finite.

    Args:
        adapter: The adapter.
        source: The path of its file, for error messages.

    Raises:
        AdapterFormatError: If the adapter is empty, or holds NaN or infinity.
    """
    count = sum(1 for _ in named_tensors(adapter))
    if not count:
        raise AdapterFormatError(
            f"{source}: the adapter is empty; expected at least one layer, bias or textual-inversion embedding"
        )
    non_finite = adapter.non_finite
    if non_finite:
        raise AdapterFormatError(
            f"{source}: {len(non_finite)} of {count} tensors hold NaN or infinity (first: {non_finite[0]}); "
            "training diverged, use an earlier checkpoint"
        )
