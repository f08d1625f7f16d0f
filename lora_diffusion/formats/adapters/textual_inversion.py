"""Textual-inversion embeddings: learned words, in files of their own or beside layers [arXiv:2208.01618].

Of their own: `{token: vectors}` (diffusers), `string_to_param` (A1111's pickles), `emb_params` (A1111's safetensors),
`clip_l` and `clip_g` (SDXL). Beside kohya's layers: `bundle_emb.<token>.string_to_param.*`.
"""

from __future__ import annotations

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
BUNDLE = re.compile(r"bundle_emb\.(?P<token>.+?)\.(?:string_to_param\.\*|(?P<encoder>clip_[lg]))$")
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
ENCODER_KEYS = {component: key for key, component in ENCODERS.items()}
WIDTHS = {width for family in FAMILIES.values() for width in family.text_widths.values()}


def can_read(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every tensor can be a learned word: vectors as wide as a text encoder, under a name without a path."""
    return bool(tensors) and all(is_vectors(tensor) and "lora" not in key for key, tensor in tensors.items())


def is_vectors(tensor: Tensor) -> bool:
    return tensor.ndim in (1, 2) and tensor.shape[-1] in WIDTHS and tensor.is_floating_point()


def parse_tensors(tensors: Mapping[str, Tensor], source: str) -> ParsedFile:
    """Learned words; a file that does not name its word takes the file's own name."""
    stem = Path(source).stem
    if set(tensors) <= set(ENCODERS):
        tokens: dict[str, Token] = {stem: {ENCODERS[key]: as_vectors(tensor) for key, tensor in tensors.items()}}
    else:
        names = {key: stem if key in ("emb_params", "*") else key for key in tensors}
        tokens = {names[key]: {infer_component(tensor): as_vectors(tensor)} for key, tensor in tensors.items()}
    return ParsedFile(dialect=DIALECT, tokens=tokens)


def as_vectors(tensor: Tensor) -> Tensor:
    """(n, width)."""
    return tensor.reshape(-1, tensor.shape[-1])


def infer_component(tensor: Tensor) -> str:
    """The text encoder that vectors of this width belong to."""
    return "text_encoder_2" if tensor.shape[-1] == FAMILIES["sdxl"].text_widths["text_encoder_2"] else "text_encoder"


def read_bundled_tokens(tensors: Mapping[str, Tensor], source: str) -> dict[str, Token]:
    """The learned words beside a file's layers."""
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = BUNDLE.match(key)
        if match is None:
            continue
        if not is_vectors(tensor):
            raise AdapterFormatError(
                f"{source}: {key} of shape {tuple(tensor.shape)} is no learned token; expected (vectors, width) with a "
                f"width of {', '.join(map(str, sorted(WIDTHS)))}"
            )
        component = ENCODERS[match["encoder"]] if match["encoder"] else infer_component(tensor)
        tokens.setdefault(match["token"], {})[component] = as_vectors(tensor)
    return dict(tokens)


def bundle_tokens(tokens: Mapping[str, Token]) -> dict[str, Tensor]:
    """The same, to be written beside kohya's layers."""
    return {
        f"bundle_emb.{word}.{ENCODER_KEYS[component] if len(token) > 1 else 'string_to_param.*'}": tensor
        for word, token in tokens.items()
        for component, tensor in token.items()
    }


def save_embedding(adapter: Adapter, path: Path) -> None:
    """Write one learned word: `{token: vectors}`, or `clip_l` and `clip_g` for two encoders, whole or not at all.

    Raises AdapterFormatError unless the adapter is one learned word, OutputError if it cannot be written.
    """
    if len(adapter.tokens) != 1 or adapter.layers or adapter.biases:
        raise AdapterFormatError(
            f"{adapter.metadata.name or 'the adapter'}: holds {len(adapter.tokens)} learned tokens and "
            f"{len(adapter.paths)} layers; a textual-inversion file holds one token and nothing else"
        )
    word, token = next(iter(adapter.tokens.items()))
    single = len(token) == 1
    tensors = {word if single else ENCODER_KEYS[component]: tensor for component, tensor in token.items()}
    entries = {
        **modelspec_entries(adapter, tensors, title=word),
        **record_entry(adapter, alpha={}, hashed=False),
    }
    if entries.get("modelspec.architecture"):
        entries["modelspec.architecture"] = entries["modelspec.architecture"].replace("/lora", "/textual-inversion")
    write_safetensors(path, tensors, entries)
