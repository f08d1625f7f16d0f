"""Add the textual-inversion embeddings of a blend to a merged checkpoint.

In a folder, they become tokens of the tokenizers and rows of the token embeddings. A single file has no tokenizer, so
they are written as files beside it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, Token
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.textual_inversion import save_embedding
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.models.textual_inversion import TOKENIZERS


def embedding_rows(tokens: Mapping[str, Token], base: Checkpoint) -> dict[str, Tensor]:
    """Return the vectors to append to the token embeddings of each text encoder.

    Args:
        tokens: Vectors per text encoder, by trigger word.
        base: Checkpoint to merge into.

    Returns:
        Rows (vectors, width) by the name of the token-embedding parameter.

    Raises:
        ConfigError: If a trigger word has no vectors for one of the text encoders, or vectors of another width.
    """
    rows: dict[str, Tensor] = {}
    for component in base.layout.text_layers if tokens else ():
        name = f"{component}.text_model.embeddings.token_embedding.weight"
        width = base.parameters[name].kind[1][1]
        for word, token in tokens.items():
            if component not in token or token[component].shape[1] != width:
                raise ConfigError(
                    f"{base.path}: the textual-inversion embedding {word!r} has no vectors of width {width} for "
                    f"{component}; use one that was trained for this family"
                )
        rows[name] = torch.cat([token[component].float() for token in tokens.values()])
    return rows


def _list_token_names(tokens: Mapping[str, Token], component: str) -> list[str]:
    """Name a token for each vector; several vectors of `word` are `word`, `word_1`, `word_2`, as in diffusers."""
    return [
        word if i == 0 else f"{word}_{i}" for word, token in tokens.items() for i in range(token[component].shape[0])
    ]


def add_to_folder(part: str | os.PathLike[str], tokens: Mapping[str, Token], base: Checkpoint) -> None:
    """Add tokens to the tokenizers of a folder that is being written, and adapt the text encoders' configuration.

    Args:
        part: Folder that is being written.
        tokens: Vectors per text encoder, by trigger word.
        base: Checkpoint that is merged into.

    Raises:
        ConfigError: If a tokenizer contains one of the tokens already.
    """
    part = Path(part)
    from transformers import CLIPTokenizer  # slow to import, and only merges of textual-inversion embeddings need it

    for name, rows in embedding_rows(tokens, base).items():
        component = name.partition(".")[0]
        folder = part / TOKENIZERS[component]
        tokenizer: Any = cast(Any, CLIPTokenizer).from_pretrained(folder)
        vocabulary_size = base.parameters[name].kind[1][0]
        token_names = _list_token_names(tokens, component)
        if len(tokenizer) != vocabulary_size or tokenizer.add_tokens(token_names) != len(token_names):
            raise ConfigError(
                f"{base.path}: its tokenizer contains the tokens {', '.join(tokens)} already; merge without these "
                "textual-inversion embeddings"
            )
        tokenizer.save_pretrained(folder)
        file = part / component / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["vocab_size"] = vocabulary_size + rows.shape[0]
        # Old files have 2 here, which makes transformers look for the largest id; that would now be an added token.
        config["eos_token_id"] = tokenizer.eos_token_id
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_beside(output: str | os.PathLike[str], tokens: Mapping[str, Token], family: str) -> list[Path]:
    """Write each embedding as a textual-inversion file beside a single-file checkpoint.

    Args:
        output: Single-file checkpoint; the files are named `<its stem>.<word>.safetensors`.
        tokens: Vectors per text encoder, by trigger word.
        family: Name of the model family, for the metadata.

    Returns:
        The files that were written.
    """
    output, files = Path(output), list[Path]()
    for word, token in tokens.items():
        file_word = "".join(letter if letter.isalnum() else "_" for letter in word).strip("_") or "word"
        files.append(output.with_name(f"{output.stem}.{file_word}.safetensors"))
        save_embedding(
            Adapter(layers={}, tokens={word: token}, metadata=AdapterMetadata(name=word, family=family)), files[-1]
        )
    return files
