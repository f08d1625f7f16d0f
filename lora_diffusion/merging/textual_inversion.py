"""Learned words of a blend in a merged checkpoint: tokens and embeddings of a folder, or files beside a single file."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, Token
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.textual_inversion import save_embedding
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.models.textual_inversion import TOKENIZERS


def embedding_rows(words: Mapping[str, Token], base: Checkpoint) -> dict[str, Tensor]:
    """The vectors to put below each table of embeddings, by its parameter's name.

    Raises ConfigError for a word that lacks one of the base's encoders or has vectors of another width.
    """
    rows: dict[str, Tensor] = {}
    for component in base.layout.text_layers if words else ():
        name = f"{component}.text_model.embeddings.token_embedding.weight"
        width = base.parameters[name].kind[1][1]
        for word, token in words.items():
            if component not in token or token[component].shape[1] != width:
                raise ConfigError(f"the word {word!r} has no vectors of width {width} for {component} of {base.path}")
        rows[name] = torch.cat([token[component].float() for token in words.values()])
    return rows


def list_token_names(words: Mapping[str, Token], component: str) -> list[str]:
    """A token for each vector, as diffusers expands a word of several: `word`, `word_1`, `word_2`."""
    return [
        word if i == 0 else f"{word}_{i}" for word, token in words.items() for i in range(token[component].shape[0])
    ]


def add_to_folder(part: Path, words: Mapping[str, Token], base: Checkpoint) -> None:
    """Add the words to the tokenizers in a folder that is being written, and count their rows in its configuration.

    Raises ConfigError if a tokenizer has one of the words already.
    """
    from transformers import CLIPTokenizer  # slow to import, and only merges of learned words need it

    for component, rows in ((name.partition(".")[0], rows) for name, rows in embedding_rows(words, base).items()):
        folder = part / TOKENIZERS[component]
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        table = base.parameters[f"{component}.text_model.embeddings.token_embedding.weight"].kind[1][0]
        names = list_token_names(words, component)
        if len(tokenizer) != table or tokenizer.add_tokens(names) != len(names):
            raise ConfigError(f"{base.path}: its tokenizer has {', '.join(words)} already; merge without the words")
        tokenizer.save_pretrained(folder)
        file = part / component / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["vocab_size"] = table + rows.shape[0]
        config["eos_token_id"] = tokenizer.eos_token_id  # 2, in old files, means the largest id, which a word now has
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_beside(output: Path, words: Mapping[str, Token], family: str) -> list[Path]:
    """Write each word as a textual-inversion file beside a single-file checkpoint, and say where."""
    files: list[Path] = []
    for word, token in words.items():
        plain = "".join(letter if letter.isalnum() else "_" for letter in word).strip("_") or "word"
        files.append(output.with_name(f"{output.stem}.{plain}.safetensors"))
        save_embedding(
            Adapter(layers={}, tokens={word: token}, metadata=AdapterMetadata(name=word, family=family)), files[-1]
        )
    return files
