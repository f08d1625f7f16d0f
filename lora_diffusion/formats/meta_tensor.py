"""A tensor's shape and type without its values, so that a file can be looked at without importing torch.

It answers what the readers of the dialects ask of a tensor; the arithmetic of the layers needs real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_diffusion.errors import AdapterFormatError


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaTensor:
    """Shape and type of a tensor, and the value if it is a single number that was read with the header."""

    shape: tuple[int, ...]
    dtype: str
    """As torch spells it: `float16`."""
    value: float | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return "float" in self.dtype

    def reshape(self, *shape: int) -> MetaTensor:
        known = math.prod(side for side in shape if side != -1)
        return replace(self, shape=tuple(self.numel() // known if side == -1 else side for side in shape))

    def float(self) -> MetaTensor:
        return replace(self, dtype="float32")

    def __mul__(self, factor: float) -> MetaTensor:
        return replace(self, value=None if self.value is None else self.value * factor)

    def __float__(self) -> float:
        if self.value is None:
            raise AdapterFormatError(f"a value of type {self.dtype} and shape {self.shape}; expected one number")
        return self.value
