"""The `Adapter`: layers by module path with metadata, independent of files and models.

Terms: `down` (A, rank x in) and `up` (B, out x rank) are the two factors of a LoRA layer; scale = alpha / rank;
delta = scale * up @ down is what the adapter adds to the weight of a module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from lora_diffusion.adapters.layers import DoRALayer, FullLayer, Layer, LowRank
from lora_diffusion.core.dtypes import tensor_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AdapterMetadata(BaseModel):
    """Everything known about an adapter besides its tensors; saved in the header of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    """Display name."""
    family: str = ""
    """Name of the model family in `families.FAMILIES`, such as `sd1`; empty if unknown."""
    base_name: str = ""
    """Name of the base model that it was trained on."""
    base_hash: str = ""
    """Hash of the base model that it was trained on."""
    trigger_words: tuple[str, ...] = ()
    """Words in a prompt that activate the adapter."""
    description: str = ""
    """Free text for users."""
    training: Mapping[str, Any] = {}
    """Resolved settings and results of the training run."""
    created: str = ""
    """Creation time, ISO 8601 in UTC."""
    source_format: str = "native"
    """Format of the file that it was read from, such as `kohya` or `peft`."""
    variant: str = ""
    """Variant of the base within its family: `v-prediction`, `inpainting`, or empty."""
    min_rank: Annotated[int, Field(validation_alias=AliasChoices("min_rank", "least_rank"))] = 0
    """Rank that acts in pure noise, for a T-LoRA; 0 for an adapter that is the same at every denoising step."""
    notes: tuple[str, ...] = ()
    """Assumptions made while reading the file."""
    merged_from: tuple[str, ...] = ()
    """Names or hashes of the adapters that were merged into this one."""

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Name the fields that identify the adapter, so that `repr` fits on one line."""
        for name in ("name", "family", "variant", "base_name", "trigger_words", "source_format"):
            if value := getattr(self, name):
                yield name, value


Token: TypeAlias = "Mapping[str, Tensor]"
"""Learned embeddings of one token: vectors (n, width) by text encoder component."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Adapter:
    """Layers by module path, with biases, learned token embeddings and metadata.

    Two adapters have the same content if their `hash` is equal; `==` compares identity.
    """

    layers: Mapping[str, Layer]
    """Updates of weights, by module path."""
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    """Additions to biases, (out,), by module path."""
    tokens: Mapping[str, Token] = field(default_factory=dict[str, Token])
    """Learned token embeddings (textual inversion) by token [arXiv:2208.01618]."""
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    """Name, family, provenance and training settings."""

    def __post_init__(self) -> None:
        for name in ("layers", "biases", "tokens"):
            object.__setattr__(self, name, MappingProxyType(dict(sorted(getattr(self, name).items()))))

    def __repr__(self) -> str:
        """Describe the adapter on one line, with the first digits of its content hash.

        The hash is left out for an adapter that was loaded without values, from its header alone.
        """
        kinds = [kind for kind in self.kinds if kind not in ("bias", "textual inversion")]
        parts = [
            repr(self.metadata.name) if self.metadata.name else "",
            self.metadata.family,
            _count(len(self.paths), "module") if self.paths or not self.tokens else "",
            _count(len(self.tokens), "token") if self.tokens else "",
            "+".join(kinds) if kinds != ["LoRA"] else "",
            _format_ranks(self.layers.values()),
            "+".join(self.components),
            f"sha256:{self.hash[:8]}" if _has_values(self) else "",
        ]
        return f"Adapter({', '.join(filter(None, parts))})"

    @cached_property
    def hash(self) -> str:
        """SHA-256 over module paths, alphas and tensors, independent of the file and the metadata."""
        return _content_hash(self)

    @cached_property
    def non_finite(self) -> tuple[str, ...]:
        """Names of the tensors that contain NaN or infinity."""
        named = dict(named_tensors(self))
        if _is_all_finite(tuple(named.values())):
            return ()
        return tuple(name for name, tensor in named.items() if not bool(tensor.float().isfinite().all()))

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all modules whose weight or bias it changes, sorted."""
        return tuple(sorted({*self.layers, *self.biases}))

    @property
    def components(self) -> tuple[str, ...]:
        """Pipeline components that it changes or adds tokens to, such as `unet` and `text_encoder`."""
        with_tokens = (component for token in self.tokens.values() for component in token)
        return tuple(sorted({*(path.split(".", 1)[0] for path in self.paths), *with_tokens}, reverse=True))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layer it contains, such as `LoRA` or `LoCon`, and `bias` and `textual inversion`; sorted."""
        kinds = {_layer_kind(layer) for layer in self.layers.values()}
        kinds |= {"bias"} if self.biases else set()
        return tuple(sorted(kinds | ({"textual inversion"} if self.tokens else set())))

    @property
    def num_parameters(self) -> int:
        """Number of values in all its tensors."""
        return sum(tensor.numel() for _, tensor in named_tensors(self))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _format_ranks(layers: Iterable[Layer]) -> str:
    """Return `rank 8`, `rank 4-16` if layers differ, or an empty string if no layer has a rank."""
    ranks = {layer.rank for layer in layers if isinstance(layer, LowRank | DoRALayer)}
    if not ranks:
        return ""
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"rank {min(ranks)}-{max(ranks)}"


def _has_values(adapter: Adapter) -> bool:
    """Return whether its tensors have values, unlike those of `load_meta_adapter`."""
    return all(hasattr(tensor, "device") and tensor.device.type != "meta" for _, tensor in named_tensors(adapter))


def _layer_kind(layer: Layer) -> str:
    """Return `LoRA`, `LoCon` (LoRA with a kernel wider than 1), `LoHa`, `LoKr`, `DoRA` (or `DoRA on LoHa`), ..."""
    if isinstance(layer, DoRALayer):
        inner = _layer_kind(layer.inner)
        return "DoRA" if inner == "LoRA" else f"DoRA on {inner}"
    if isinstance(layer, FullLayer) and layer.diff.ndim == 1:
        return "norm"
    wide = layer.kind == "LoRA" and any(side > 1 for side in layer.weight_shape[2:])
    return "LoCon" if wide else layer.kind


def named_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Iterate over all tensors with names for messages, such as `<module path> down`."""
    for path, layer in adapter.layers.items():
        yield from ((f"{path} {name}", factor) for name, factor in layer.factors.items())
    yield from ((f"{path} bias", bias) for path, bias in adapter.biases.items())
    for word, token in adapter.tokens.items():
        yield from ((f"token {word!r} of {component}", vectors) for component, vectors in sorted(token.items()))


def adapter_hash(adapter: Adapter) -> str:
    """Return the content hash that identifies an adapter in presets, recipes and files."""
    return adapter.hash


def _content_hash(adapter: Adapter) -> str:
    """Compute the SHA-256 over module paths, layer kinds, alphas, dtypes, shapes and values; see `Adapter.hash`."""
    digest = hashlib.sha256()
    for path, layer in adapter.layers.items():
        kind = "" if layer.kind == "LoRA" else f"|{layer.kind}"
        digest.update(f"{path}|{float(getattr(layer, 'alpha', 1.0))!r}{kind}".encode())
        for name, factor in layer.factors.items():
            digest.update(_tensor_label(factor, name if kind else ""))
            digest.update(tensor_bytes(factor))
    for path, bias in adapter.biases.items():
        digest.update(_tensor_label(bias, f"{path}|bias"))
        digest.update(tensor_bytes(bias))
    for word, token in adapter.tokens.items():
        for component, vectors in sorted(token.items()):
            digest.update(_tensor_label(vectors, f"token|{word}|{component}"))
            digest.update(tensor_bytes(vectors))
    return digest.hexdigest()


def _tensor_label(tensor: Tensor, name: str) -> bytes:
    """Return the label that is hashed before the bytes of a tensor."""
    return f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()


def _is_all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return True if the sums of all tensors are finite, which proves that all values are.

    This costs a tenth of checking every value. False proves nothing: a sum of finite values may overflow.
    """
    import torch

    if any(tensor.dtype.itemsize == 1 for tensor in tensors):  # torch cannot sum the 8-bit dtypes
        return False
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    return not sums or bool(torch.stack(sums).isfinite().all())


def cast_adapter(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return the adapter with all tensors converted to `dtype`."""
    return Adapter(
        layers={
            path: layer.with_factors({name: factor.to(dtype) for name, factor in layer.factors.items()})
            for path, layer in adapter.layers.items()
        },
        biases={path: bias.to(dtype) for path, bias in adapter.biases.items()},
        tokens={word: {c: v.to(dtype) for c, v in token.items()} for word, token in adapter.tokens.items()},
        metadata=adapter.metadata,
    )
