"""Define `MetaTensor`, a stand-in for a tensor without values, so that files can be inspected without torch.

It implements the part of torch's tensor interface that the format readers use. Layer arithmetic needs real tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_diffusion.errors import AdapterFormatError


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaTensor:
    """The shape and dtype of a tensor, and its value if it has a single element."""

    shape: tuple[int, ...]
    dtype: str
    """torch dtype name, such as `float16`."""
    value: float | None = None
    """The value of a tensor with one element; None if it was not read."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        """Return whether the dtype is a floating point type."""
        return "float" in self.dtype

    def reshape(self, *shape: int) -> MetaTensor:
        """Return the tensor with another shape, in which one size may be -1."""
        known = math.prod(size for size in shape if size != -1)
        return replace(self, shape=tuple(self.numel() // known if size == -1 else size for size in shape))

    def float(self) -> MetaTensor:
        """Return the tensor as float32."""
        return replace(self, dtype="float32")

    def __mul__(self, factor: float) -> MetaTensor:
        return replace(self, value=None if self.value is None else self.value * factor)

    def __float__(self) -> float:
        if self.value is None:
            raise AdapterFormatError(f"got a tensor of dtype {self.dtype} and shape {self.shape}; expected one number")
        return self.value
