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

    placeholder_token: str
    """The token as it is written in a prompt."""
    adapter: str
    """The adapter's name."""
    names: tuple[str, ...]
    """The tokenizer entries of its vectors, in order."""
    embeddings: Token = field(repr=False)
    """The embedding vectors (n, width) for each text encoder."""


def _list_learned_tokens(blend: Blend) -> tuple[LearnedToken, ...]:
    """Return the learned tokens of all adapters with a weight other than zero."""
    adapters = {entry.hash: entry for entry in blend.active if entry.adapter.tokens}
    return tuple(
        make_learned_token(entry, number, placeholder_token, embeddings)
        for entry in adapters.values()
        for number, (placeholder_token, embeddings) in enumerate(sorted(entry.adapter.tokens.items()))
    )


def make_learned_token(entry: WeightedAdapter, number: int, placeholder_token: str, embeddings: Token) -> LearnedToken:
    """Create a learned token, with a name for the tokenizer entry of each of its vectors.

    The names contain no brackets or colons, because these have a meaning in prompts.

    Args:
        entry: The adapter with the token.
        number: The token's position among the tokens of the adapter.
        placeholder_token: The token as it is written in a prompt.
        embeddings: The embedding vectors for each text encoder.
    """
    count = max(vectors.shape[0] for vectors in embeddings.values())
    names = tuple(f"<{entry.hash[:8]}-{number}-{i}>" for i in range(count))
    return LearnedToken(placeholder_token=placeholder_token, adapter=entry.name, names=names, embeddings=embeddings)


def prompt_rewriter(tokens: tuple[LearnedToken, ...]) -> Callable[[str], str]:
    """Return a function that replaces learned tokens in a prompt with the names of their tokenizer entries.

    In a prompt, a token is written as `token` or, to choose between adapters, as `adapter/token`. The returned function
    raises ConfigError for a plain `token` that several adapters define.

    Args:
        tokens: The learned tokens to replace.

    Raises:
        ConfigError: If two adapters of the same name define the same token.
    """
    by_name: dict[tuple[str, str], LearnedToken] = {}
    for token in tokens:
        if by_name.setdefault((token.adapter, token.placeholder_token), token) is not token:
            raise ConfigError(
                f"two adapters named {token.adapter!r} define the token {token.placeholder_token!r}; rename one of the "
                "adapters"
            )
    owners: dict[str, list[LearnedToken]] = {}
    for token in tokens:
        owners.setdefault(token.placeholder_token, []).append(token)
    table = {_qualified_name(token): token for token in tokens}
    table |= {text: defined[0] for text, defined in owners.items() if len(defined) == 1}
    spellings = sorted({*table, *owners}, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w/]){re.escape(text)}(?![\w/])" for text in spellings))

    def replacement(match: re.Match[str]) -> str:
        if match[0] not in table:
            choices = " or ".join(sorted(map(_qualified_name, owners[match[0]])))
            raise ConfigError(f"several adapters define the token {match[0]!r}; write {choices} in the prompt")
        return " ".join(table[match[0]].names)

    return lambda prompt: pattern.sub(replacement, prompt) if spellings else prompt


def _qualified_name(token: LearnedToken) -> str:
    """Return how a prompt names a token of one adapter among those of several."""
    return f"{token.adapter}/{token.placeholder_token}"


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
    tokens = _list_learned_tokens(blend)
    with ExitStack() as stack:
        for component in base.layout.text_layers if tokens else ():
            vectors = {token: _get_vectors(base, component, token) for token in tokens}
            stack.enter_context(extended_vocabulary(base, component, vectors))
        yield prompt_rewriter(tokens)


def _get_vectors(base: Base, component: str, token: LearnedToken) -> Tensor:
    """Return the vectors (n, width) of a token for one text encoder, after checking their width."""
    vectors = token.embeddings.get(component)
    if vectors is None:
        have = ", ".join(sorted(token.embeddings))
        raise ConfigError(
            f"{token.adapter}: its learned token {token.placeholder_token!r} has vectors for {have} and none for "
            f"{component}; use a base with the text encoders that it was trained with"
        )
    width = embedding_table(base, component).embedding_dim
    if vectors.shape[1] != width:
        raise FamilyMismatchError(
            f"{token.adapter}: its learned token {token.placeholder_token!r} has vectors of width {vectors.shape[1]}, "
            f"but {component} of {base.name} has width {width}; use a base of the family that it was trained on"
        )
    return vectors


def embedding_table(base: Base, component: str) -> nn.Embedding:
    """Return the token embedding table of a text encoder."""
    table = getattr(base.pipe, component).get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


@contextmanager
def extended_vocabulary(base: Base, component: str, vectors: Mapping[LearnedToken, Tensor]) -> Generator[None]:
    """Add tokens to one text encoder, and to a copy of its tokenizer, inside the block.

    Args:
        base: The base to extend.
        component: The text encoder, such as `text_encoder_2`.
        vectors: The learned tokens with their vectors (n, width).

    Raises:
        ConfigError: If the tokenizer already has an entry of the same name.
    """
    attribute = TOKENIZERS[component]
    own_tokenizer, table = getattr(base.pipe, attribute), embedding_table(base, component)
    own_weight, own_count = table.weight, table.num_embeddings
    tokenizer = copy.deepcopy(own_tokenizer)
    names = [name for token in vectors for name in token.names]
    if tokenizer.add_tokens(names, special_tokens=True) != len(names):
        known = ", ".join(token.placeholder_token for token in vectors)
        raise ConfigError(
            f"{base.name}: its tokenizer already has an entry for one of the learned tokens {known}; remove the entry "
            "from the base's tokenizer, or the adapter from the blend"
        )
    rows = torch.cat([each.to(own_weight.device, own_weight.dtype) for each in vectors.values()])
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
