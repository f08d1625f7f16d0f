"""Write adapters in the native format: PEFT keys, which diffusers can load, and everything else in the metadata.

Keys are `<module path>.lora_A.weight` (down) and `<module path>.lora_B.weight` (up). DoRA adds
`.lora_magnitude_vector`. Tensors that PEFT has no keys for use LyCORIS' names (`.hada_w1_a`, `.lora_mid.weight`,
`.diff`). diffusers rejects files with any other tensor, so alpha is stored in the metadata: in `lora_adapter_metadata`,
which diffusers and PEFT apply, and by module path in this library's record. Textual-inversion embeddings are in the
metadata too.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_diffusion.adapters.adapter import Adapter, Token
from lora_diffusion.adapters.layers import DoRALayer, LoRALayer
from lora_diffusion.core.dtypes import dtype_name, tensor_bytes, torch_dtype
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.lycoris_tensors import ALPHA, MAGNITUDE, layer_to_tensors
from lora_diffusion.formats.adapters.metadata import modelspec_entries, record_entry
from lora_diffusion.formats.adapters.parsed import validate_adapter
from lora_diffusion.formats.adapters.peft import MAGNITUDE_VECTOR, PEFT_KEY
from lora_diffusion.formats.meta_tensor import MetaTensor
from lora_diffusion.formats.safetensors import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_KEY = "lora_diffusion_tokens"
"""Metadata key of the textual-inversion embeddings."""
_PEFT_LEAVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Save an adapter in the native format, a .safetensors file that diffusers can load. The write is atomic.

    Raises:
        AdapterFormatError: If the adapter is empty, or holds NaN or infinity.
        OutputError: If the file cannot be written.
    """
    path = Path(path)
    validate_adapter(adapter, str(path))
    tensors = _native_tensors(adapter)
    write_safetensors(path, tensors, _build_header(adapter, tensors, title=adapter.metadata.name or path.stem))


def _native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return all tensors by key."""
    tensors: dict[str, Tensor] = {}
    for path in adapter.paths:
        layer = adapter.layers.get(path)
        leaves = layer_to_tensors(layer, adapter.biases.get(path))
        leaves.pop(ALPHA, None)
        if isinstance(layer, DoRALayer) and isinstance(layer.inner, LoRALayer) and layer.per_output:
            leaves[MAGNITUDE_VECTOR] = _magnitude_vector(leaves.pop(MAGNITUDE))
        tensors |= {f"{path}.{_PEFT_LEAVES.get(leaf, leaf)}": tensor for leaf, tensor in leaves.items()}
    return tensors


def _magnitude_vector(magnitude: Tensor) -> Tensor:
    """Reshape DoRA magnitudes to PEFT's shape: (out,) for a linear layer, (1, out, 1, 1) for a convolution."""
    return magnitude.flatten() if magnitude.ndim == 2 else magnitude.transpose(0, 1)


def _build_header(adapter: Adapter, tensors: Mapping[str, Tensor], *, title: str) -> dict[str, str]:
    """Return the metadata entries of a native file."""
    alphas = {
        path: float(alpha)
        for path, layer in adapter.layers.items()
        if (alpha := getattr(layer, "alpha", None)) is not None
    }
    entries = {
        **record_entry(adapter, alpha=alphas, hashed=True),
        PEFT_KEY: json.dumps(_peft_metadata(adapter), sort_keys=True),
        **modelspec_entries(adapter, tensors, title=title),
    }
    if adapter.tokens:
        entries[TOKENS_KEY] = json.dumps(
            {name: _encode_token(token) for name, token in adapter.tokens.items()}, sort_keys=True
        )
    return entries


def _peft_metadata(adapter: Adapter) -> dict[str, Any]:
    """Return PEFT's LoraConfig fields for rank and alpha, prefixed with the component, as diffusers reads them."""
    entries: dict[str, Any] = {}
    for component in adapter.components:
        layers = {
            path.removeprefix(f"{component}."): layer.inner if isinstance(layer, DoRALayer) else layer
            for path, layer in adapter.layers.items()
            if path.startswith(f"{component}.")
        }
        lora_layers = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALayer)}
        if not lora_layers:
            continue
        ranks = {path: layer.rank for path, layer in lora_layers.items()}
        alphas = {path: float(layer.alpha) for path, layer in lora_layers.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": "|".join(_module_regex(p) for p in sorted(lora_layers)),
            "rank_pattern": {f"^{_module_regex(p)}": r for p, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{_module_regex(p)}": a for p, a in alphas.items() if a != alpha},
        }
        if all(isinstance(adapter.layers[f"{component}.{path}"], DoRALayer) for path in lora_layers):
            config["use_dora"] = True
        entries |= {f"{component}.{key}": value for key, value in config.items()}
    return entries


def _module_regex(path: str) -> str:
    """Return a regular expression for a module with or without `text_model.` (see `peft._canonical_path`)."""
    inner = path.removeprefix("text_model.")
    return re.escape(path) if inner == path else rf"(text_model\.)?{re.escape(inner)}"


def _encode_token(token: Token) -> dict[str, Any]:
    """Encode a textual-inversion embedding as JSON: dtype, shape and base64 bytes, by text encoder."""
    return {
        component: {
            "dtype": dtype_name(vectors.dtype),
            "shape": list(vectors.shape),
            "data": base64.b64encode(tensor_bytes(vectors)).decode(),
        }
        for component, vectors in token.items()
    }


def read_tokens(
    entries: Mapping[str, str], source: str, decode: Callable[[Mapping[str, Any]], Tensor]
) -> dict[str, Token]:
    """Read the textual-inversion embeddings in the metadata of a native file.

    Args:
        entries: Metadata of the file.
        source: The path of the file, for error messages.
        decode: `decode_token`, or `token_meta` to read only shapes and dtypes.

    Returns:
        The embeddings, by name.

    Raises:
        AdapterFormatError: If an embedding is damaged.
    """
    try:
        tokens = json.loads(entries.get(TOKENS_KEY, "{}"))
        return {
            name: {component: decode(entry) for component, entry in token.items()} for name, token in tokens.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as error:
        raise AdapterFormatError(
            f"{source}: metadata entry {TOKENS_KEY!r} cannot be read ({error}); the file is damaged"
        ) from None


def token_meta(entry: Mapping[str, Any]) -> Tensor:
    """Read the shape and dtype of an embedding in the metadata, as `MetaTensor`, without importing torch."""
    return cast("Tensor", MetaTensor(shape=tuple(map(int, entry["shape"])), dtype=str(entry["dtype"])))


def decode_token(entry: Mapping[str, Any]) -> Tensor:
    """Decode an embedding in the metadata, of shape (vectors, width)."""
    import torch

    data = bytearray(base64.b64decode(entry["data"], validate=True))
    return torch.frombuffer(data, dtype=torch_dtype(entry["dtype"])).reshape(entry["shape"])
