"""Encode prompts of any length, with emphasis weights on tokens.

A CLIP text encoder reads 75 tokens. A longer prompt is split into chunks, which are encoded as separate prompts and
concatenated along the token axis, as A1111 and kohya's trainer do. A chunk ends at a comma among its last 20 tokens, or
else at the end of a word. SDXL's pooled embedding is that of the first chunk.

A token with weight w gets the hidden state `empty + w * (hidden - empty)`, where `empty` is the hidden state of the
empty prompt at the same position, as in ComfyUI. A1111 multiplies hidden states and then rescales them to their old
mean, which for SDXL divides by a mean near zero.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_diffusion.models.load import Base
from lora_diffusion.prompts.emphasis import Prompt, ReadText, parse_emphasis

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The pipeline's attribute for the tokenizer of each text encoder."""
Chunk = list[tuple[int, float]]
"""Token ids with their emphasis weights, without start, end and padding tokens."""


class Tokenizer(Protocol):
    """The part of transformers' CLIP tokenizers that is used; their own annotations are incomplete."""

    model_max_length: int
    """Number of tokens that the text encoder reads, start and end tokens included."""
    bos_token_id: int
    """The start token."""
    eos_token_id: int
    """The end token."""
    pad_token_id: int
    """The padding token."""

    def __call__(self, text: str, **options: bool) -> Any:
        """Tokenize a text; the result has the attribute `input_ids`."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the tokens that were added to the vocabulary."""
        ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the texts of tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextContext:
    """Prompt embeddings as the UNet takes them."""

    hidden: Tensor = field(repr=False)
    """Hidden states (n, tokens, width) for cross-attention."""
    added: dict[str, Tensor] | None = field(default=None, repr=False)
    """SDXL's `added_cond_kwargs`: pooled `text_embeds` (n, width) and `time_ids` (n, 6); None for SD 1.x and 2.x."""


def encode_prompts(
    base: Base, prompts: Sequence[str], *, size_px: int, read: ReadText = parse_emphasis, chunks: int = 1
) -> TextContext:
    """Encode prompts with every text encoder of a base.

    Gradients flow into trainable parameters of the encoders. Shorter prompts are padded to the length of the longest
    one with chunks of the empty prompt.

    Args:
        base: The base whose text encoders are used.
        prompts: The texts to encode.
        size_px: Width and height of the image in pixels, for SDXL's size conditioning.
        read: The parser of the texts: with emphasis such as `(red:1.3)`, or literal.
        chunks: The least number of chunks to pad to.

    Raises:
        ConfigError: If a prompt cannot be parsed.
    """
    parsed = [read(text) for text in prompts]
    count = max(chunks, count_chunks(base, parsed))
    if len(base.layout.text_layers) == 1:
        return TextContext(hidden=_encode_component(base, "text_encoder", parsed, count)[0])
    encoded = [_encode_component(base, component, parsed, count) for component in base.layout.text_layers]
    pooled = encoded[-1][1]
    ids = torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]] * len(parsed), dtype=pooled.dtype)
    return TextContext(
        hidden=torch.cat([hidden for hidden, _ in encoded], dim=-1),
        added={"text_embeds": pooled, "time_ids": ids.to(pooled.device)},
    )


def negative_context(base: Base, prompt: str, *, size_px: int, chunks: int = 1) -> TextContext:
    """Encode a negative prompt.

    An empty one gives zeros if the pipeline's configuration has `force_zeros_for_empty_prompt`, as SDXL's does.

    Args:
        base: The base whose text encoders are used.
        prompt: The negative prompt, perhaps empty.
        size_px: Width and height of the image in pixels, for SDXL's size conditioning.
        chunks: The least number of chunks to pad to.

    Raises:
        ConfigError: If the prompt cannot be parsed.
    """
    context = encode_prompts(base, [prompt], size_px=size_px, chunks=chunks)
    if prompt or not base.pipe.config.get("force_zeros_for_empty_prompt", False) or context.added is None:
        return context
    pooled = torch.zeros_like(context.added["text_embeds"])
    return TextContext(hidden=torch.zeros_like(context.hidden), added={**context.added, "text_embeds": pooled})


def concatenate_contexts(contexts: Sequence[TextContext]) -> TextContext:
    """Concatenate embeddings of the same number of tokens along the batch axis."""
    added = [context.added for context in contexts if context.added is not None]
    return TextContext(
        hidden=torch.cat([context.hidden for context in contexts]),
        added={name: torch.cat([each[name] for each in added]) for name in added[0]} if added else None,
    )


def _encode_component(base: Base, component: str, prompts: Sequence[Prompt], count: int) -> tuple[Tensor, Tensor]:
    """Encode prompts in `count` chunks each with one text encoder.

    Returns:
        Hidden states (n, count * tokens per chunk, width), and the encoder's first output for the first chunk of each
        prompt, which is the pooled embedding of SDXL's second encoder.
    """
    encoder, tokenizer = getattr(base.pipe, component), getattr(base.pipe, TOKENIZERS[component])
    single_encoder = len(base.layout.text_layers) == 1

    def encode_chunks(chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([_add_special_tokens(tokenizer, [token for token, _ in chunk]) for chunk in chunks])
        output = encoder(ids.to(encoder.device), output_hidden_states=not single_encoder)
        return output.last_hidden_state if single_encoder else output.hidden_states[-2], output[0]

    chunks = [chunk for prompt in prompts for chunk in _pad_chunks(split_chunks(tokenizer, prompt), count)]
    hidden, first = encode_chunks(chunks)
    weights = torch.ones(hidden.shape[:2], dtype=hidden.dtype)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
    if bool((weights != 1).any()):
        empty, _ = encode_chunks([[]])
        hidden = torch.lerp(empty.expand_as(hidden), hidden, weights.to(hidden.device)[..., None])
    return hidden.reshape(len(prompts), -1, hidden.shape[-1]), first[::count]


def count_chunks(base: Base, prompts: Sequence[Prompt]) -> int:
    """Return the number of chunks of the longest prompt, in the tokenizer that needs the most."""
    tokenizers = [getattr(base.pipe, TOKENIZERS[name]) for name in base.layout.text_layers]
    return max(len(split_chunks(tokenizer, prompt)) for tokenizer in tokenizers for prompt in prompts)


def split_chunks(tokenizer: Tokenizer, prompt: Prompt) -> list[Chunk]:
    """Tokenize a prompt and split it into chunks that fit the text encoder.

    Args:
        tokenizer: A CLIP tokenizer of transformers.
        prompt: A parsed prompt; each of its sections, which BREAK separates, starts a new chunk.

    Returns:
        At least one chunk of at most `model_max_length - 2` tokens, without start, end and padding tokens.
    """
    max_tokens = tokenizer.model_max_length - 2
    sections = [
        [(token, span.weight) for span in section for token in _tokenize(tokenizer, span.text)] for section in prompt
    ]
    return [chunk for section in sections for chunk in _split_tokens(tokenizer, section, max_tokens)]


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text, with multi-vector tokens expanded to all of their vectors."""
    for word, names in _find_multi_vector_tokens(tokenizer).items():
        text = re.sub(rf"{re.escape(word)}(?!_\d)", lambda _, names=names: " ".join(names), text)
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _find_multi_vector_tokens(tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Find added tokens with several vectors, which diffusers names `word`, `word_1`, `word_2` and so on."""
    added = tokenizer.get_added_vocab()
    found: dict[str, list[str]] = {}
    for word in added:
        names = [word, *itertools.takewhile(added.__contains__, (f"{word}_{i}" for i in itertools.count(1)))]
        if len(names) > 1:
            found[word] = names
    return found


def _split_tokens(tokenizer: Tokenizer, tokens: Chunk, max_tokens: int) -> Iterator[Chunk]:
    """Split the tokens of a section into chunks of at most `max_tokens`."""
    while len(tokens) > max_tokens:
        end = _find_chunk_end(tokenizer, [token for token, _ in tokens[: max_tokens + 1]])
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def _find_chunk_end(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Return how many of `ids` go into the next chunk; the last one belongs to the chunk after it.

    The chunk ends after the last comma among the last 20 of 75 tokens, or else after the last whole word.
    """
    max_tokens = len(ids) - 1
    comma = tokenizer(",", add_special_tokens=False).input_ids[-1]
    commas = [i for i in range(max_tokens - max_tokens * 20 // 75, max_tokens) if ids[i] == comma]
    if commas:
        return commas[-1] + 1
    added = set(tokenizer.get_added_vocab().values())
    words = tokenizer.convert_ids_to_tokens(ids)
    ends = [
        i + 1
        for i in range(max_tokens)
        if (words[i].endswith("</w>") or ids[i] in added) and not (ids[i] in added and ids[i + 1] in added)
    ]
    return ends[-1] if ends else max_tokens


def _pad_chunks(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    """Append empty chunks up to `count` chunks."""
    return [*chunks, *[[] for _ in range(count - len(chunks))]]


def _add_special_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Put the token ids of a chunk between the start and end tokens, and pad them to the model's length."""
    padding = tokenizer.model_max_length - 2 - len(ids)
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
