"""The native file: PEFT's key layout as diffusers reads it, everything else in the header.

Keys are `<module path>.lora_A.weight` (down) and `.lora_B.weight` (up); DoRA adds `.lora_magnitude_vector`, and what
PEFT has no keys for is called as LyCORIS calls it (`<module path>.hada_w1_a`, `.lora_mid.weight`, `.diff`). diffusers
refuses a file with any further tensor, so the alpha of each layer is in the header instead: as `lora_adapter_metadata`,
which diffusers and PEFT apply, and once more by module path in our own record. Learned tokens are in the header too.
"""

from __future__ import annotations

import base64
import json
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
PEFT_LEAVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write the native file, whole or not at all.

    Raises AdapterFormatError for an adapter without layers or with NaN in them, OutputError if it cannot be written.
    """
    validate_adapter(adapter, str(path))
    tensors = native_tensors(adapter)
    write_safetensors(path, tensors, build_header(adapter, tensors, title=adapter.metadata.name or path.stem))


def native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors under their keys."""
    tensors: dict[str, Tensor] = {}
    for path in adapter.paths:
        layer = adapter.layers.get(path)
        leaves = layer_to_tensors(layer, adapter.biases.get(path))
        leaves.pop(ALPHA, None)
        if isinstance(layer, DoRALayer) and isinstance(layer.inner, LoRALayer) and layer.per_output:
            leaves[MAGNITUDE_VECTOR] = magnitude_vector(leaves.pop(MAGNITUDE))
        tensors |= {f"{path}.{PEFT_LEAVES.get(leaf, leaf)}": tensor for leaf, tensor in leaves.items()}
    return tensors


def magnitude_vector(magnitude: Tensor) -> Tensor:
    """Magnitudes per output as PEFT holds them: (out,) for a linear module, (1, out, 1, 1) for a convolution."""
    return magnitude.flatten() if magnitude.ndim == 2 else magnitude.transpose(0, 1)


def build_header(adapter: Adapter, tensors: Mapping[str, Tensor], *, title: str) -> dict[str, str]:
    """All header entries, as strings."""
    alpha = {p: float(a) for p, layer in adapter.layers.items() if (a := getattr(layer, "alpha", None)) is not None}
    entries = {
        **record_entry(adapter, alpha=alpha, hashed=True),
        PEFT_KEY: json.dumps(peft_metadata(adapter), sort_keys=True),
        **modelspec_entries(adapter, tensors, title=title),
    }
    if adapter.tokens:
        entries[TOKENS_KEY] = json.dumps(
            {w: encode_token(token) for w, token in adapter.tokens.items()}, sort_keys=True
        )
    return entries


def peft_metadata(adapter: Adapter) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that carry rank and alpha, per component, as diffusers wants them."""
    entries: dict[str, Any] = {}
    for component in adapter.components:
        layers = {
            path.removeprefix(f"{component}."): layer.inner if isinstance(layer, DoRALayer) else layer
            for path, layer in adapter.layers.items()
            if path.startswith(f"{component}.")
        }
        ranked = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALayer)}
        if not ranked:
            continue
        ranks = {path: layer.rank for path, layer in ranked.items()}
        alphas = {path: float(layer.alpha) for path, layer in ranked.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": "|".join(module_regex(p) for p in sorted(ranked)),
            "rank_pattern": {f"^{module_regex(p)}": r for p, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{module_regex(p)}": a for p, a in alphas.items() if a != alpha},
        }
        dora = [isinstance(adapter.layers[f"{component}.{path}"], DoRALayer) for path in ranked]
        if all(dora):
            config["use_dora"] = True
        entries |= {f"{component}.{key}": value for key, value in config.items()}
    return entries


def module_regex(path: str) -> str:
    """A regular expression for a module with or without the level `text_model` (see `peft.canonical_path`)."""
    inner = path.removeprefix("text_model.")
    return re.escape(path) if inner == path else rf"(text_model\.)?{re.escape(inner)}"


def encode_token(token: Token) -> dict[str, Any]:
    """A learned token as text: its vectors' type, shape and bytes, by component."""
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
    """The learned tokens in a header of ours, each vector read by `decode_token` or `token_meta`.

    Raises AdapterFormatError if they cannot be read.
    """
    try:
        table = json.loads(entries.get(TOKENS_KEY, "{}"))
        return {word: {component: decode(entry) for component, entry in token.items()} for word, token in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as error:
        raise AdapterFormatError(f"{source}: header entry {TOKENS_KEY!r} cannot be read ({error})") from None


def token_meta(entry: Mapping[str, Any]) -> Tensor:
    """Shape and type alone, without torch."""
    return cast("Tensor", MetaTensor(shape=tuple(map(int, entry["shape"])), dtype=str(entry["dtype"])))


def decode_token(entry: Mapping[str, Any]) -> Tensor:
    import torch

    data = bytearray(base64.b64decode(entry["data"], validate=True))
    return torch.frombuffer(data, dtype=torch_dtype(entry["dtype"])).reshape(entry["shape"])
