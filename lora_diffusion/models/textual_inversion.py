"""Learned words (textual inversion) of a blend's adapters in a base's text encoders, for as long as they are needed.

Each word gets tokens of its adapter's own, named after the adapter's hash, so that two adapters' words never collide;
prompts are rewritten to those [arXiv:2208.01618]. Tokenizers are copied, and the encoders' own tables of embeddings are
put back as the very same tensors.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Token
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.models.load import Base
from lora_diffusion.models.text_encoding import TOKENIZERS


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedToken:
    """A learned word of one adapter."""

    word: str
    adapter: str
    names: tuple[str, ...]
    """What its vectors are called in the tokenizers, one after another."""
    token: Token


def learned_tokens_of(blend: Blend) -> tuple[LearnedToken, ...]:
    """Every learned word of the adapters that are on."""
    adapters = {entry.hash: entry for entry in blend.active if entry.adapter.tokens}
    return tuple(
        make_token_names(entry, number, word, token)
        for entry in adapters.values()
        for number, (word, token) in enumerate(sorted(entry.adapter.tokens.items()))
    )


def make_token_names(entry: WeightedAdapter, number: int, word: str, token: Token) -> LearnedToken:
    """Names without brackets or colons, which mean something in a prompt."""
    count = max(vectors.shape[0] for vectors in token.values())
    names = tuple(f"<{entry.hash[:8]}-{number}-{i}>" for i in range(count))
    return LearnedToken(word=word, adapter=entry.name, names=names, token=token)


def prompt_rewriter(words: tuple[LearnedToken, ...]) -> Callable[[str], str]:
    """Turns the words of a prompt into their tokens' names.

    A word is also known as `adapter/word`. The returned function raises ConfigError for a word that several adapters
    have, where the prompt does not say whose is meant.
    """
    named: dict[tuple[str, str], LearnedToken] = {}
    for word in words:
        if named.setdefault((word.adapter, word.word), word) is not word:
            raise ConfigError(f"two adapters are called {word.adapter!r} and have the word {word.word!r}; rename one")
    owners: dict[str, list[LearnedToken]] = {}
    for word in words:
        owners.setdefault(word.word, []).append(word)
    table = {f"{word.adapter}/{word.word}": word for word in words}
    table |= {word: found[0] for word, found in owners.items() if len(found) == 1}
    every = sorted({*table, *owners}, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w/]){re.escape(text)}(?![\w/])" for text in every))

    def tokens(match: re.Match[str]) -> str:
        if match[0] not in table:
            choices = " or ".join(sorted(f"{word.adapter}/{word.word}" for word in owners[match[0]]))
            raise ConfigError(f"several adapters have learned the word {match[0]!r}; write {choices} in the prompt")
        return " ".join(table[match[0]].names)

    return lambda prompt: pattern.sub(tokens, prompt) if every else prompt


@contextmanager
def learned_tokens(base: Base, blend: Blend) -> Iterator[Callable[[str], str]]:
    """The base with the blend's learned words in its text encoders; yields what rewrites a prompt to them.

    Everything is as it was afterwards, whatever happens inside. Raises FamilyMismatchError for vectors that are not as
    wide as the encoder's, ConfigError for a word that lacks one of the base's encoders.
    """
    words = learned_tokens_of(blend)
    with ExitStack() as stack:
        for component in base.layout.text_layers if words else ():
            stack.enter_context(
                extended_vocabulary(base, component, {word: get_vectors(base, component, word) for word in words})
            )
        yield prompt_rewriter(words)


def get_vectors(base: Base, component: str, word: LearnedToken) -> Tensor:
    """A word's vectors (n, width) for one text encoder."""
    vectors = word.token.get(component)
    if vectors is None:
        have = ", ".join(sorted(word.token))
        raise ConfigError(f"{word.adapter}: its word {word.word!r} has vectors for {have} and none for {component}")
    width = embedding_table(base, component).embedding_dim
    if vectors.shape[1] != width:
        raise FamilyMismatchError(
            f"{word.adapter}: its word {word.word!r} has vectors of width {vectors.shape[1]}, but {component} of "
            f"{base.name} reads width {width}; use the base that it was trained on"
        )
    return vectors


def embedding_table(base: Base, component: str) -> nn.Embedding:
    table = getattr(base.pipe, component).get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


@contextmanager
def extended_vocabulary(base: Base, component: str, words: Mapping[LearnedToken, Tensor]) -> Iterator[None]:
    """One text encoder and a copy of its tokenizer with more tokens."""
    attribute = TOKENIZERS[component]
    own_tokenizer, table = getattr(base.pipe, attribute), embedding_table(base, component)
    own_weight, own_count = table.weight, table.num_embeddings
    tokenizer = copy.deepcopy(own_tokenizer)
    names = [name for word in words for name in word.names]
    if tokenizer.add_tokens(names, special_tokens=True) != len(names):
        known = ", ".join(word.word for word in words)
        raise ConfigError(f"{base.name}: its tokenizer has some of the words {known} already, under their full names")
    rows = torch.cat([vectors.to(own_weight.device, own_weight.dtype) for vectors in words.values()])
    ends = eos_holders(getattr(base.pipe, component))
    try:
        weight = torch.cat([own_weight.data[: len(own_tokenizer)], rows])
        table.weight, table.num_embeddings = nn.Parameter(weight, requires_grad=False), weight.shape[0]
        for holder in ends:
            holder.eos_token_id = tokenizer.eos_token_id
        setattr(base.pipe, attribute, tokenizer)
        yield
    finally:
        setattr(base.pipe, attribute, own_tokenizer)
        for holder, own in ends.items():
            holder.eos_token_id = own
        table.weight, table.num_embeddings = own_weight, own_count


def eos_holders(encoder: nn.Module) -> dict[Any, int]:
    """The modules that look for the end of a prompt, with the id that they look for.

    Old checkpoints say 2, at which transformers takes the largest id for the end, as it was before words were added.
    """
    found = ((module, vars(module).get("eos_token_id")) for module in encoder.modules())
    return {module: end for module, end in found if isinstance(end, int)}
