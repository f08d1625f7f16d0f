"""An adapter is a value: module path -> layer, with what is known about it.

Words: `down` (A, rank x in) and `up` (B, out x rank) are the two factors; `scale` = alpha / rank;
`delta` = scale * up @ down is what the adapter adds to a module's weight. Knows nothing of files or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel, ConfigDict

from lora_diffusion.adapters.layers import DoRALayer, FullLayer, Layer
from lora_diffusion.core.dtypes import tensor_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    """The dialect of the file that it was read from."""
    variant: str = ""
    """What sets its base apart within the family: `v-prediction`, `inpainting`, or nothing."""
    least_rank: int = 0
    """Of a T-LoRA: the directions that act in pure noise; 0 for an adapter that is the same at every step."""
    notes: tuple[str, ...] = ()
    """What a reader had to assume."""
    merged_from: tuple[str, ...] = ()
    """Names or hashes of the adapters that this one was made of."""


Token: TypeAlias = "Mapping[str, Tensor]"
"""A learned token's vectors (n, width), one entry for each text encoder, by component."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """Layers by module path, with metadata. Two adapters are the same if `adapter_hash` says so."""

    layers: Mapping[str, Layer]
    """What is added to the weight of each module."""
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    """What is added to the bias of each module, (out,)."""
    tokens: Mapping[str, Token] = field(default_factory=dict[str, Token])
    """Learned words (textual inversion) [arXiv:2208.01618]."""
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)

    def __post_init__(self) -> None:
        for name in ("layers", "biases", "tokens"):
            object.__setattr__(self, name, MappingProxyType(dict(sorted(getattr(self, name).items()))))

    @cached_property
    def hash(self) -> str:
        """SHA-256 over paths, alphas and tensors: the same for the same content, whatever the file or its metadata."""
        return content_hash(self)

    @cached_property
    def non_finite(self) -> tuple[str, ...]:
        """The tensors that hold NaN or infinity, by name."""
        named = dict(named_tensors(self))
        if is_all_finite(tuple(named.values())):
            return ()
        return tuple(name for name, tensor in named.items() if not bool(tensor.float().isfinite().all()))

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module path that it changes."""
        return tuple(sorted({*self.layers, *self.biases}))

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the pipeline that it touches."""
        worded = (component for token in self.tokens.values() for component in token)
        return tuple(sorted({*(path.split(".", 1)[0] for path in self.paths), *worded}, reverse=True))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layer in it, and of what else it holds, as people call them."""
        found = {layer_kind(layer) for layer in self.layers.values()}
        found |= {"bias"} if self.biases else set()
        return tuple(sorted(found | ({"textual inversion"} if self.tokens else set())))

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for _, tensor in named_tensors(self))


def layer_kind(layer: Layer) -> str:
    """`LoRA`, `LoCon` (LoRA on a kernel wider than 1), `LoHa`, `LoKr`, `DoRA` (or `DoRA on LoHa`), `full`, `norm`."""
    if isinstance(layer, DoRALayer):
        inner = layer_kind(layer.inner)
        return "DoRA" if inner == "LoRA" else f"DoRA on {inner}"
    if isinstance(layer, FullLayer) and layer.diff.ndim == 1:
        return "norm"
    wide = layer.kind == "LoRA" and any(side > 1 for side in layer.weight_shape[2:])
    return "LoCon" if wide else layer.kind


def named_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with a name for messages: `<module path> <factor>`."""
    for path, layer in adapter.layers.items():
        yield from ((f"{path} {name}", factor) for name, factor in layer.factors.items())
    yield from ((f"{path} bias", bias) for path, bias in adapter.biases.items())
    for word, token in adapter.tokens.items():
        yield from ((f"token {word!r} of {component}", vectors) for component, vectors in sorted(token.items()))


def adapter_hash(adapter: Adapter) -> str:
    """The content hash by which presets, recipes and files know an adapter."""
    return adapter.hash


def content_hash(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for path, layer in adapter.layers.items():
        kind = "" if layer.kind == "LoRA" else f"|{layer.kind}"
        digest.update(f"{path}|{float(getattr(layer, 'alpha', 1.0))!r}{kind}".encode())
        for name, factor in layer.factors.items():
            digest.update(tensor_label(factor, name if kind else ""))
            digest.update(tensor_bytes(factor))
    for path, bias in adapter.biases.items():
        digest.update(tensor_label(bias, f"{path}|bias"))
        digest.update(tensor_bytes(bias))
    for word, token in adapter.tokens.items():
        for component, vectors in sorted(token.items()):
            digest.update(tensor_label(vectors, f"token|{word}|{component}"))
            digest.update(tensor_bytes(vectors))
    return digest.hexdigest()


def tensor_label(tensor: Tensor, name: str) -> bytes:
    """What a hash takes in before a tensor's bytes."""
    return f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()


def is_all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether finite sums show, at a tenth of the cost of looking, that all values are; a sum may also overflow."""
    import torch

    if any(tensor.dtype.itemsize == 1 for tensor in tensors):  # the 8-bit types have no sum
        return False
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    return not sums or bool(torch.stack(sums).isfinite().all())


def cast_adapter(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter with every tensor rounded to `dtype`."""
    return Adapter(
        layers={
            path: layer.with_factors({name: factor.to(dtype) for name, factor in layer.factors.items()})
            for path, layer in adapter.layers.items()
        },
        biases={path: bias.to(dtype) for path, bias in adapter.biases.items()},
        tokens={word: {c: v.to(dtype) for c, v in token.items()} for word, token in adapter.tokens.items()},
        metadata=adapter.metadata,
    )
