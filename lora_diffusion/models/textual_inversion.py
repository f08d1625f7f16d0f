"""Add the learned tokens (textual inversion, arXiv:2208.01618) of a blend to a base's text encoders.

Each learned token gets tokenizer entries named after its adapter's hash, so that tokens of different adapters never
collide, and prompts are rewritten to these names. The tokenizers are replaced by copies and the embedding tables by
longer ones for the duration of a context manager; afterwards the original objects are put back.
"""

import copy
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
    """A learned token of one adapter."""

    word: str
    """The token as it is written in a prompt."""
    adapter: str
    """The adapter's name."""
    names: tuple[str, ...]
    """The tokenizer entries of its vectors, in order."""
    token: Token = field(repr=False)
    """The embedding vectors (n, width) for each text encoder."""


def _list_learned_tokens(blend: Blend) -> tuple[LearnedToken, ...]:
    """Return the learned tokens of all adapters with a weight other than zero."""
    adapters = {entry.hash: entry for entry in blend.active if entry.adapter.tokens}
    return tuple(
        make_learned_token(entry, number, word, token)
        for entry in adapters.values()
        for number, (word, token) in enumerate(sorted(entry.adapter.tokens.items()))
    )


def make_learned_token(entry: WeightedAdapter, number: int, word: str, token: Token) -> LearnedToken:
    """Create a learned token, with a name for the tokenizer entry of each of its vectors.

    The names contain no brackets or colons, because these have a meaning in prompts.

    Args:
        entry: The adapter with the token.
        number: The token's position among the tokens of the adapter.
        word: The token as it is written in a prompt.
        token: The embedding vectors for each text encoder.
    """
    count = max(vectors.shape[0] for vectors in token.values())
    names = tuple(f"<{entry.hash[:8]}-{number}-{i}>" for i in range(count))
    return LearnedToken(word=word, adapter=entry.name, names=names, token=token)


def prompt_rewriter(words: tuple[LearnedToken, ...]) -> Callable[[str], str]:
    """Return a function that replaces learned tokens in a prompt with the names of their tokenizer entries.

    In a prompt, a token is written as `word` or, to choose between adapters, as `adapter/word`. The returned function
    raises ConfigError for a plain `word` that several adapters define.

    Args:
        words: The learned tokens to replace.

    Raises:
        ConfigError: If two adapters of the same name define the same token.
    """
    by_name: dict[tuple[str, str], LearnedToken] = {}
    for word in words:
        if by_name.setdefault((word.adapter, word.word), word) is not word:
            raise ConfigError(
                f"two adapters named {word.adapter!r} define the token {word.word!r}; rename one of the adapters"
            )
    owners: dict[str, list[LearnedToken]] = {}
    for word in words:
        owners.setdefault(word.word, []).append(word)
    table = {f"{word.adapter}/{word.word}": word for word in words}
    table |= {word: tokens[0] for word, tokens in owners.items() if len(tokens) == 1}
    spellings = sorted({*table, *owners}, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w/]){re.escape(text)}(?![\w/])" for text in spellings))

    def replacement(match: re.Match[str]) -> str:
        if match[0] not in table:
            choices = " or ".join(sorted(f"{word.adapter}/{word.word}" for word in owners[match[0]]))
            raise ConfigError(f"several adapters define the token {match[0]!r}; write {choices} in the prompt")
        return " ".join(table[match[0]].names)

    return lambda prompt: pattern.sub(replacement, prompt) if spellings else prompt


@contextmanager
def learned_tokens(base: Base, blend: Blend) -> Generator[Callable[[str], str]]:
    """Add the learned tokens of a blend to the base's text encoders inside the block.

    The tokenizers and embedding tables are restored when the block ends, also after an exception.

    Args:
        base: The base whose text encoders are extended.
        blend: The adapters with the tokens.

    Yields:
        A function that replaces learned tokens in a prompt with the names of their tokenizer entries.

    Raises:
        FamilyMismatchError: If the vectors of a token do not have the width of the text encoder.
        ConfigError: If a token has no vectors for one of the base's text encoders, or if two adapters conflict.
    """
    words = _list_learned_tokens(blend)
    with ExitStack() as stack:
        for component in base.layout.text_layers if words else ():
            stack.enter_context(
                extended_vocabulary(base, component, {word: _get_vectors(base, component, word) for word in words})
            )
        yield prompt_rewriter(words)


def _get_vectors(base: Base, component: str, word: LearnedToken) -> Tensor:
    """Return the vectors (n, width) of a token for one text encoder, after checking their width."""
    vectors = word.token.get(component)
    if vectors is None:
        have = ", ".join(sorted(word.token))
        raise ConfigError(
            f"{word.adapter}: its learned token {word.word!r} has vectors for {have} and none for {component}; use a "
            "base with the text encoders that it was trained with"
        )
    width = embedding_table(base, component).embedding_dim
    if vectors.shape[1] != width:
        raise FamilyMismatchError(
            f"{word.adapter}: its learned token {word.word!r} has vectors of width {vectors.shape[1]}, but {component} "
            f"of {base.name} has width {width}; use a base of the family that it was trained on"
        )
    return vectors


def embedding_table(base: Base, component: str) -> nn.Embedding:
    """Return the token embedding table of a text encoder."""
    table = getattr(base.pipe, component).get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


@contextmanager
def extended_vocabulary(base: Base, component: str, words: Mapping[LearnedToken, Tensor]) -> Generator[None]:
    """Add tokens to one text encoder, and to a copy of its tokenizer, inside the block.

    Args:
        base: The base to extend.
        component: The text encoder, such as `text_encoder_2`.
        words: The learned tokens with their vectors (n, width).

    Raises:
        ConfigError: If the tokenizer already has an entry of the same name.
    """
    attribute = TOKENIZERS[component]
    own_tokenizer, table = getattr(base.pipe, attribute), embedding_table(base, component)
    own_weight, own_count = table.weight, table.num_embeddings
    tokenizer = copy.deepcopy(own_tokenizer)
    names = [name for word in words for name in word.names]
    if tokenizer.add_tokens(names, special_tokens=True) != len(names):
        known = ", ".join(word.word for word in words)
        raise ConfigError(
            f"{base.name}: its tokenizer already has an entry for one of the learned tokens {known}; remove the entry "
            "from the base's tokenizer, or the adapter from the blend"
        )
    rows = torch.cat([vectors.to(own_weight.device, own_weight.dtype) for vectors in words.values()])
    eos_ids = _eos_holders(getattr(base.pipe, component))
    try:
        weight = torch.cat([own_weight.data[: len(own_tokenizer)], rows])
        table.weight, table.num_embeddings = nn.Parameter(weight, requires_grad=False), weight.shape[0]
        for holder in eos_ids:
            holder.eos_token_id = tokenizer.eos_token_id
        setattr(base.pipe, attribute, tokenizer)
        yield
    finally:
        setattr(base.pipe, attribute, own_tokenizer)
        for holder, own_id in eos_ids.items():
            holder.eos_token_id = own_id
        table.weight, table.num_embeddings = own_weight, own_count


def _eos_holders(encoder: nn.Module) -> dict[Any, int]:
    """Return the modules that have an `eos_token_id`, with its value.

    In old checkpoints it is 2, for which transformers takes the position of the largest token id as the end of the
    prompt. Learned tokens have larger ids than the end token, so the id must be set explicitly while they are there.
    """
    ids = ((module, vars(module).get("eos_token_id")) for module in encoder.modules())
    return {module: eos_id for module, eos_id in ids if isinstance(eos_id, int)}
