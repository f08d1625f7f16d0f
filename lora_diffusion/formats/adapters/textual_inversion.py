"""Read and write textual-inversion embeddings, as separate files or bundled with layers [arXiv:2208.01618].

Formats of separate files: `{token: vectors}` (diffusers), `string_to_param` (A1111 pickles), `emb_params` (A1111
safetensors), `clip_l` and `clip_g` (SDXL). kohya files bundle embeddings as `bundle_emb.<token>.string_to_param.*`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.adapters.adapter import Adapter, Token
from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.metadata import modelspec_entries, record_entry
from lora_diffusion.formats.adapters.parsed import ParsedFile
from lora_diffusion.formats.safetensors import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

DIALECT = "textual inversion"
"""Name of this format in `AdapterMetadata.source_format`."""
BUNDLE = re.compile(r"bundle_emb\.(?P<token>.+?)\.(?:string_to_param\.\*|(?P<encoder>clip_[lg]))$")
"""Pattern of the keys of bundled embeddings."""
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_ENCODER_KEYS = {component: key for key, component in _ENCODERS.items()}
_WIDTHS = {width for family in FAMILIES.values() for width in family.text_widths.values()}


def can_read(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether every tensor can be an embedding, by its shape, dtype and key."""
    return bool(tensors) and all(is_vectors(tensor) and "lora" not in key for key, tensor in tensors.items())


def is_vectors(tensor: Tensor) -> bool:
    """Return whether a tensor can be an embedding: floating point of shape (width,) or (vectors, width)."""
    return tensor.ndim in (1, 2) and tensor.shape[-1] in _WIDTHS and tensor.is_floating_point()


def parse_tensors(tensors: Mapping[str, Tensor], source: str) -> ParsedFile:
    """Parse the tensors of a textual-inversion file; an embedding without a name is named after the file.

    Args:
        tensors: Tensors of the file, by key.
        source: The path of the file.
    """
    stem = Path(source).stem
    if set(tensors) <= set(_ENCODERS):
        tokens: dict[str, Token] = {stem: {_ENCODERS[key]: as_vectors(tensor) for key, tensor in tensors.items()}}
    else:
        names = {key: stem if key in ("emb_params", "*") else key for key in tensors}
        tokens = {names[key]: {infer_component(tensor): as_vectors(tensor)} for key, tensor in tensors.items()}
    return ParsedFile(dialect=DIALECT, tokens=tokens)


def as_vectors(tensor: Tensor) -> Tensor:
    """Reshape an embedding to (vectors, width)."""
    return tensor.reshape(-1, tensor.shape[-1])


def infer_component(tensor: Tensor) -> str:
    """Return the text encoder that an embedding of this width belongs to."""
    return "text_encoder_2" if tensor.shape[-1] == FAMILIES["sdxl"].text_widths["text_encoder_2"] else "text_encoder"


def read_bundled_tokens(tensors: Mapping[str, Tensor], source: str) -> dict[str, Token]:
    """Read the embeddings that are bundled with layers.

    Args:
        tensors: Tensors of the file, by key.
        source: The path of the file, for error messages.

    Returns:
        The embeddings, by name.

    Raises:
        AdapterFormatError: If an embedding has the wrong shape or dtype.
    """
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = BUNDLE.match(key)
        if match is None:
            continue
        if not is_vectors(tensor):
            raise AdapterFormatError(
                f"{source}: {key} of shape {tuple(tensor.shape)} is not a textual-inversion embedding; expected "
                f"floating point of shape (vectors, width) with a width of {', '.join(map(str, sorted(_WIDTHS)))}"
            )
        component = _ENCODERS[match["encoder"]] if match["encoder"] else infer_component(tensor)
        tokens.setdefault(match["token"], {})[component] = as_vectors(tensor)
    return dict(tokens)


def bundle_tokens(tokens: Mapping[str, Token]) -> dict[str, Tensor]:
    """Return embeddings as tensors by key, to be bundled with the layers of a kohya file."""
    return {
        f"bundle_emb.{name}.{_ENCODER_KEYS[component] if len(token) > 1 else 'string_to_param.*'}": tensor
        for name, token in tokens.items()
        for component, tensor in token.items()
    }


def save_embedding(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Save a textual-inversion embedding: `{token: vectors}`, or `clip_l` and `clip_g` for two text encoders.

    The write is atomic.

    Args:
        adapter: An adapter with one embedding and no layers.
        path: The .safetensors file to write.

    Raises:
        AdapterFormatError: If the adapter has layers, or not exactly one embedding.
        OutputError: If the file cannot be written.
    """
    if len(adapter.tokens) != 1 or adapter.layers or adapter.biases:
        raise AdapterFormatError(
            f"{adapter.metadata.name or 'the adapter'}: has {len(adapter.tokens)} textual-inversion embeddings and "
            f"{len(adapter.paths)} layers; a textual-inversion file holds exactly one embedding and no layers"
        )
    name, token = next(iter(adapter.tokens.items()))
    is_single = len(token) == 1
    tensors = {name if is_single else _ENCODER_KEYS[component]: tensor for component, tensor in token.items()}
    entries = {
        **modelspec_entries(adapter, tensors, title=name),
        **record_entry(adapter, alpha={}, hashed=False),
    }
    if entries.get("modelspec.architecture"):
        entries["modelspec.architecture"] = entries["modelspec.architecture"].replace("/lora", "/textual-inversion")
    write_safetensors(path, tensors, entries)
