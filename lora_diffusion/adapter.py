"""An adapter is a value: module path -> layer, with what is known about it.

Words: `down` (A, rank x in) and `up` (B, out x rank) are the two factors; `scale` = alpha / rank;
`delta` = scale * up @ down is what the adapter adds to a module's weight. Knows nothing of files or models.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.precision import tensor_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRALayer:
    """The low-rank update of one linear or convolution module [arXiv:2106.09685].

    Linear: `down` (rank, in), `up` (out, rank). Convolution: `down` (rank, in, kh, kw), `up` (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if not (self.down.is_floating_point() and self.up.is_floating_point()):
            raise AdapterFormatError(f"factors of type {self.up.dtype} and {self.down.dtype}; expected floating point")
        if not math.isfinite(self.alpha):
            raise AdapterFormatError(f"alpha is {self.alpha}; expected a finite number")
        if self.down.ndim not in (2, 4) or self.up.ndim != self.down.ndim:
            raise AdapterFormatError(
                f"factors of shape {tuple(self.up.shape)} and {tuple(self.down.shape)}; expected both with 2 "
                "dimensions (linear) or both with 4 (convolution)"
            )
        rank = self.down.shape[0]
        if rank < 1 or self.up.shape[1] != rank or tuple(self.up.shape[2:]) not in ((), (1, 1)):
            raise AdapterFormatError(
                f"up {tuple(self.up.shape)} does not follow down {tuple(self.down.shape)}; expected up (out, rank) "
                "after down (rank, in)"
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer updates."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """scale * up @ down in float32, of shape `weight_shape`."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.weight_shape)


class AdapterMetadata(BaseModel):
    """What is known about an adapter besides its tensors; round-trips to a file's header."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    family: str = ""
    """Name in `families.FAMILIES`."""
    base_name: str = ""
    base_hash: str = ""
    trigger_words: tuple[str, ...] = ()
    description: str = ""
    training: Mapping[str, Any] = {}
    """The resolved settings of the run that made it, and what came of it."""
    created: str = ""
    """ISO 8601, UTC."""
    source_format: str = "native"


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """Layers by module path, with metadata. Two adapters are the same if `adapter_hash` says so."""

    layers: Mapping[str, LoRALayer]
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(sorted(self.layers.items()))))

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the pipeline that it touches."""
        return tuple(sorted({path.split(".", 1)[0] for path in self.layers}, reverse=True))

    @property
    def num_parameters(self) -> int:
        return sum(layer.down.numel() + layer.up.numel() for layer in self.layers.values())


def adapter_hash(adapter: Adapter) -> str:
    """SHA-256 over paths, alphas and factors: the same for the same tensors, whatever the file or its metadata."""
    digest = hashlib.sha256()
    for path, layer in adapter.layers.items():
        digest.update(f"{path}|{float(layer.alpha)!r}".encode())
        for factor in (layer.down, layer.up):
            digest.update(f"|{factor.dtype}|{tuple(factor.shape)}|".encode())
            digest.update(tensor_bytes(factor))
    return digest.hexdigest()


def non_finite_paths(adapter: Adapter) -> tuple[str, ...]:
    """Module paths whose factors hold NaN or infinity."""
    return tuple(
        path
        for path, layer in adapter.layers.items()
        if not (layer.down.isfinite().all() and layer.up.isfinite().all())
    )
