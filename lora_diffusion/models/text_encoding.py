"""What text encoders make of prompts of any length, with words that count more or less.

A text encoder reads 75 tokens. Longer prompts are read in chunks, each as a prompt of its own, and what comes out is
put one after another (the way of A1111 and of kohya's trainer). A chunk ends at a comma among its last tokens, else at
the end of a word. SDXL's pooled state is that of the first chunk.

A token's weight moves its hidden state along the line from what the empty prompt has at that position: 0 leaves the
empty prompt's, 1 is as read, 1.3 goes further (ComfyUI's way). A1111 multiplies hidden states and rescales all so that
their mean stays, which for SDXL divides by a mean near zero.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.models.load import Base
from lora_diffusion.prompts.emphasis import Prompt, ReadText, parse_emphasis

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
Chunk = list[tuple[int, float]]
"""Ids of tokens with their weights."""


@dataclass(frozen=True, kw_only=True)
class TextContext:
    """What the UNet is told: hidden states (n, tokens, width), and for SDXL pooled states and size ids."""

    hidden: Tensor
    added: dict[str, Tensor] | None = None


def encode_prompts(
    base: Base, prompts: Sequence[str], *, size_px: int, read: ReadText = parse_emphasis, chunks: int = 1
) -> TextContext:
    """Encode prompts with every text encoder; gradients flow if the encoders have trainable parts.

    `read` says what notation the texts are in. All come out equally long, filled up with chunks of the empty prompt,
    and `chunks` long at least. Raises ConfigError for a prompt that cannot be read.
    """
    texts = [read(text) for text in prompts]
    count = max(chunks, count_chunks(base, texts))
    if len(base.layout.text_layers) == 1:
        return TextContext(hidden=encode_with(base, "text_encoder", texts, count)[0])
    found = [encode_with(base, component, texts, count) for component in base.layout.text_layers]
    pooled = found[-1][1]
    ids = torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]] * len(texts), dtype=pooled.dtype)
    return TextContext(
        hidden=torch.cat([hidden for hidden, _ in found], dim=-1),
        added={"text_embeds": pooled, "time_ids": ids.to(pooled.device)},
    )


def negative_context(base: Base, prompt: str, *, size_px: int, chunks: int = 1) -> TextContext:
    """A negative prompt as sampling takes it: where a base has zeros for the empty one, as SDXL does, those."""
    context = encode_prompts(base, [prompt], size_px=size_px, chunks=chunks)
    if prompt or not base.pipe.config.get("force_zeros_for_empty_prompt", False) or context.added is None:
        return context
    pooled = torch.zeros_like(context.added["text_embeds"])
    return TextContext(hidden=torch.zeros_like(context.hidden), added={**context.added, "text_embeds": pooled})


def concatenate_contexts(contexts: Sequence[TextContext]) -> TextContext:
    """Of several prompts, equally long, for one batch."""
    added = [context.added for context in contexts if context.added is not None]
    return TextContext(
        hidden=torch.cat([context.hidden for context in contexts]),
        added={name: torch.cat([each[name] for each in added]) for name in added[0]} if added else None,
    )


def encode_with(base: Base, component: str, prompts: Sequence[Prompt], count: int) -> tuple[Tensor, Tensor]:
    """One text encoder's hidden states (n, tokens of all chunks, width), and the first output of each first chunk."""
    encoder, tokenizer = getattr(base.pipe, component), getattr(base.pipe, TOKENIZERS[component])
    alone = len(base.layout.text_layers) == 1

    def encode_chunks(chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([add_special_tokens(tokenizer, [token for token, _ in chunk]) for chunk in chunks])
        output = encoder(ids.to(encoder.device), output_hidden_states=not alone)
        return output.last_hidden_state if alone else output.hidden_states[-2], output[0]

    chunks = [chunk for prompt in prompts for chunk in pad_chunks(split_chunks(tokenizer, prompt), count)]
    hidden, first = encode_chunks(chunks)
    weights = torch.ones(hidden.shape[:2], dtype=hidden.dtype)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
    if bool((weights != 1).any()):
        empty, _ = encode_chunks([[]])
        hidden = torch.lerp(empty.expand_as(hidden), hidden, weights.to(hidden.device)[..., None])
    shape = len(prompts), count
    return hidden.unflatten(0, shape).flatten(1, 2), first.unflatten(0, shape)[:, 0]


def count_chunks(base: Base, prompts: Sequence[Prompt]) -> int:
    """In how many chunks the longest of some prompts is read."""
    tokenizers = [getattr(base.pipe, TOKENIZERS[name]) for name in base.layout.text_layers]
    return max(len(split_chunks(tokenizer, prompt)) for tokenizer in tokenizers for prompt in prompts)


def split_chunks(tokenizer: Any, prompt: Prompt) -> list[Chunk]:
    """The tokens of a prompt, in chunks that the encoder can read; one at least."""
    room = tokenizer.model_max_length - 2
    sections = [
        [(token, span.weight) for span in section for token in tokenize(tokenizer, span.text)] for section in prompt
    ]
    return [chunk for section in sections for chunk in split_tokens(tokenizer, section, room)]


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, with all vectors of a word that the tokenizer has several for."""
    for word, names in find_multi_vector_tokens(tokenizer).items():
        text = re.sub(rf"{re.escape(word)}(?!_\d)", lambda _, names=names: " ".join(names), text)
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def find_multi_vector_tokens(tokenizer: Any) -> dict[str, list[str]]:
    """Words that are in the tokenizer as `word`, `word_1`, `word_2` and so on, as diffusers names their vectors."""
    added = tokenizer.get_added_vocab()
    found: dict[str, list[str]] = {}
    for word in added:
        names = [word, *itertools.takewhile(added.__contains__, (f"{word}_{i}" for i in itertools.count(1)))]
        if len(names) > 1:
            found[word] = names
    return found


def split_tokens(tokenizer: Any, tokens: Chunk, room: int) -> Iterator[Chunk]:
    """A section in chunks of at most `room` tokens."""
    while len(tokens) > room:
        end = find_chunk_end(tokenizer, [token for token, _ in tokens[: room + 1]])
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def find_chunk_end(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many of these, less the last, go into a chunk: up to a comma near its end, or else up to a word's end."""
    room = len(ids) - 1
    comma = tokenizer(",", add_special_tokens=False).input_ids[-1]
    commas = [i for i in range(room - room * 20 // 75, room) if ids[i] == comma]
    if commas:
        return commas[-1] + 1
    added = set(tokenizer.get_added_vocab().values())
    words = tokenizer.convert_ids_to_tokens(ids)
    ends = [
        i + 1
        for i in range(room)
        if (words[i].endswith("</w>") or ids[i] in added) and not (ids[i] in added and ids[i + 1] in added)
    ]
    return ends[-1] if ends else room


def pad_chunks(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    """The chunks, and empty ones up to a number of them."""
    return [*chunks, *[[] for _ in range(count - len(chunks))]]


def add_special_tokens(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """A chunk as the encoder reads it: between a start and an end, padded."""
    padding = tokenizer.model_max_length - 2 - len(ids)
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
