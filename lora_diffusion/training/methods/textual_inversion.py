"""Words whose vectors are learned: textual inversion [arXiv:2208.01618], before or beside an adapter (pivotal tuning
[arXiv:2106.05744]).

A word gets rows of its own behind each text encoder's table of embeddings; nothing else in the table can change. Each
vector keeps the length that it began with, as longer ones drown the rest of the prompt.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.adapter import Adapter, Token
from lora_diffusion.adapters.blend import WeightedAdapter
from lora_diffusion.config.train import TextualInversionConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.load import Base
from lora_diffusion.models.text_encoding import TOKENIZERS
from lora_diffusion.models.textual_inversion import (
    LearnedToken,
    embedding_table,
    extended_vocabulary,
    make_token_names,
    prompt_rewriter,
)
from lora_diffusion.prompts.emphasis import Prompt, ReadText
from lora_diffusion.training.methods.callbacks import MethodCallbacks, RateOf

PREFIX = "words"
"""Of the names of vectors among the parameters: `text_encoder.words.sks`."""


@dataclass(frozen=True, kw_only=True)
class LearnedTokens:
    """The words of a run, put into its base."""

    parameters: dict[str, nn.Parameter]
    """Vectors (n, width) by component and word, float32."""
    rewrite: Callable[[str], str]
    """Turns the words of a text into their tokens' names."""
    open_words: ExitStack
    """What holds the words in the base's tokenizers; never closed, as the base is the run's own."""

    def wrap_parser(self, read: ReadText) -> ReadText:
        """The same notation, of texts with these words."""

        def parse(text: str) -> Prompt:
            return read(self.rewrite(text))

        return parse

    def extract_tokens(self, dtype: torch.dtype) -> dict[str, Token]:
        """What has been learned, on the CPU."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, vectors in self.parameters.items():
            component, _, word = name.split(".", 2)
            found.setdefault(word, {})[component] = vectors.detach().to("cpu", dtype, copy=True)
        return dict(found)


def add_learned_tokens(base: Base, config: TextualInversionConfig, seed: int) -> LearnedTokens:
    """Give the base words that learn. Mutates its tokenizers and text encoders.

    Raises ConfigError for a word to begin as that is no word of the base.
    """
    starts = {
        word: {
            component: initial_vectors(base, component, config, seed, place) for component in base.layout.text_layers
        }
        for place, word in enumerate(config.words)
    }
    holder = WeightedAdapter(adapter=Adapter(layers={}, tokens=starts))
    words = tuple(make_token_names(holder, place, word, starts[word]) for place, word in enumerate(config.words))
    parameters: dict[str, nn.Parameter] = {}
    open_words = ExitStack()
    for component in base.layout.text_layers:
        open_words.enter_context(extended_vocabulary(base, component, {word: word.token[component] for word in words}))
        parameters |= add_trainable_rows(base, component, words)
    return LearnedTokens(parameters=parameters, rewrite=prompt_rewriter(words), open_words=open_words)


def initial_vectors(base: Base, component: str, config: TextualInversionConfig, seed: int, place: int) -> Tensor:
    """What a word begins as (n, width): the vectors of another word in turn, or noise like the table's own vectors."""
    table = embedding_table(base, component).weight.detach().float().cpu()
    if not config.begin_as:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        noise = torch.randn(config.vectors, table.shape[1], generator=generator)
        return table.mean(dim=0) + table.std(dim=0) * noise
    tokenizer = getattr(base.pipe, TOKENIZERS[component])
    ids = tokenizer(config.begin_as, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"words.begin_as: {config.begin_as!r} is nothing to {component}; name a word such as 'style'")
    return table[[ids[i % len(ids)] for i in range(config.vectors)]]


def add_trainable_rows(base: Base, component: str, words: Sequence[LearnedToken]) -> dict[str, nn.Parameter]:
    """Rows behind one encoder's table whose gradients come through; the table's own rows stay frozen."""
    table: Any = embedding_table(base, component)
    count = len(getattr(base.pipe, TOKENIZERS[component])) - sum(len(word.names) for word in words)
    starts = [word.token[component].to(table.weight.device, torch.float32, copy=True) for word in words]
    rows = nn.ParameterList(nn.Parameter(start) for start in starts)

    def forward(ids: Tensor) -> Tensor:
        own = functional.embedding(ids, table.weight)
        learned = torch.cat([*rows]).to(own.dtype)
        place = (ids - count).clamp(min=0, max=len(learned) - 1)
        return torch.where((ids >= count)[..., None], functional.embedding(place, learned), own)

    table.add_module(PREFIX, rows)  # where parallel processes find them
    table.forward = forward
    return {f"{component}.{PREFIX}.{word.word}": row for word, row in zip(words, rows, strict=True)}


class TextualInversionCallbacks(MethodCallbacks):
    """Who learns when, and that each vector keeps its length."""

    def __init__(
        self,
        words: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        config: TextualInversionConfig,
        steps: int,
    ) -> None:
        self.words, self.others = words, others
        self.alone, self.until = config.alone * steps, config.until * steps
        self.lengths = {name: vectors.detach().norm(dim=1, keepdim=True) for name, vectors in words.items()}

    def frozen_parameters(self, step: int) -> Iterable[nn.Parameter]:
        others = self.others.values() if step < self.alone else ()
        return (*others, *(self.words.values() if step >= self.until else ()))

    def is_stable(self, step: int) -> bool:
        return not self.others or step > self.alone

    @torch.no_grad()
    def after_step(self, step: int, rate_of: RateOf) -> None:  # noqa: ARG002 (the same at every step)
        for name, vectors in self.words.items():
            vectors.mul_(self.lengths[name] / vectors.norm(dim=1, keepdim=True))

    def report(self) -> dict[str, Any]:
        return {"words": [name.split(".", 2)[2] for name in self.words]}
