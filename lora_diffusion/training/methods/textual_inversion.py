"""Textual inversion [arXiv:2208.01618], alone or together with an adapter (pivotal tuning, arXiv:2106.05744).

Each learned token gets rows of its own after the embedding table of each text encoder; the table itself stays frozen.
Each vector keeps its initial norm, because a longer one would dominate the rest of the prompt.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.adapter import Adapter, Token
from lora_diffusion.adapters.blend import WeightedAdapter
from lora_diffusion.config.train import TextualInversionConfig
from lora_diffusion.core.seeding import make_generator
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.forward_overrides import ForwardOverrides
from lora_diffusion.models.load import Base
from lora_diffusion.models.text_encoding import TOKENIZERS
from lora_diffusion.models.textual_inversion import (
    LearnedToken,
    embedding_table,
    extended_vocabulary,
    make_learned_token,
    prompt_rewriter,
)
from lora_diffusion.prompts.emphasis import Prompt, ReadText
from lora_diffusion.training.methods.callbacks import MethodCallbacks, RateOf

_SUBMODULE_NAME = "tokens"
"""Name of the submodule with the learned vectors; second part of parameter names such as `text_encoder.tokens.sks`."""


@dataclass(frozen=True, kw_only=True)
class LearnedTokens:
    """Learned tokens that have been added to a base."""

    parameters: dict[str, nn.Parameter] = field(repr=False)
    """Vectors (n, width) in float32, by parameter name such as `text_encoder.tokens.sks`."""
    rewrite: Callable[[str], str]
    """Replaces each learned token in a text by the names of its vectors in the tokenizers."""
    open_vocabularies: ExitStack
    """Contexts that keep the tokens in tokenizers and text encoders; never closed, as the base belongs to the run."""

    def wrap_parser(self, read: ReadText) -> ReadText:
        """Return a prompt parser that replaces the learned tokens first."""

        def parse(text: str) -> Prompt:
            return read(self.rewrite(text))

        return parse

    def extract_tokens(self, dtype: torch.dtype) -> dict[str, Token]:
        """Return the learned vectors by token and component, copied to the CPU in `dtype`."""
        tokens: dict[str, dict[str, Tensor]] = {}
        for name, vectors in self.parameters.items():
            component, _, token = name.split(".", 2)
            tokens.setdefault(token, {})[component] = vectors.detach().to("cpu", dtype, copy=True)
        return dict(tokens)


def add_learned_tokens(base: Base, config: TextualInversionConfig, seed: int) -> LearnedTokens:
    """Add trainable tokens to a base. Mutates its tokenizers and text encoders.

    Args:
        base: The base to train on.
        config: The tokens, their number of vectors and their initial value.
        seed: Seed of the random initial vectors.

    Raises:
        ConfigError: `initializer_token` gives no tokens in one of the tokenizers.
    """
    initial = {
        token: {
            component: _initial_vectors(base, component, config, seed, index) for component in base.layout.text_layers
        }
        for index, token in enumerate(config.placeholder_tokens)
    }
    entry = WeightedAdapter(adapter=Adapter(layers={}, tokens=initial))
    tokens = tuple(
        make_learned_token(entry, index, token, initial[token]) for index, token in enumerate(config.placeholder_tokens)
    )
    parameters: dict[str, nn.Parameter] = {}
    open_vocabularies, forwards = ExitStack(), ForwardOverrides()
    open_vocabularies.callback(forwards.restore)
    for component in base.layout.text_layers:
        vectors = {token: token.embeddings[component] for token in tokens}
        open_vocabularies.enter_context(extended_vocabulary(base, component, vectors))
        parameters |= _add_trainable_rows(base, component, tokens, forwards)
    return LearnedTokens(parameters=parameters, rewrite=prompt_rewriter(tokens), open_vocabularies=open_vocabularies)


def _initial_vectors(base: Base, component: str, config: TextualInversionConfig, seed: int, index: int) -> Tensor:
    """Compute the initial vectors (n, width) of the token at an index.

    They are the token vectors of `initializer_token`, repeated as needed, or normal noise with the mean and the
    standard deviation of the embedding table.
    """
    table = embedding_table(base, component).weight.detach().float().cpu()
    if not config.initializer_token:
        generator = make_generator(seed, f"{component} {index}")
        noise = torch.randn(config.num_vectors, table.shape[1], generator=generator)
        return table.mean(dim=0) + table.std(dim=0) * noise
    tokenizer = getattr(base.pipe, TOKENIZERS[component])
    ids = tokenizer(config.initializer_token, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(
            f"textual_inversion.initializer_token is {config.initializer_token!r}, which has no tokens in the "
            f"tokenizer of {component}; expected a word such as 'style'"
        )
    return table[[ids[i % len(ids)] for i in range(config.num_vectors)]]


def _add_trainable_rows(
    base: Base, component: str, tokens: Sequence[LearnedToken], forwards: ForwardOverrides
) -> dict[str, nn.Parameter]:
    """Add trainable rows after the embedding table of one text encoder; the rows of the table stay frozen."""
    table = embedding_table(base, component)
    count = len(getattr(base.pipe, TOKENIZERS[component])) - sum(len(token.names) for token in tokens)
    initial = [token.embeddings[component].to(table.weight.device, torch.float32, copy=True) for token in tokens]
    rows = nn.ParameterList(nn.Parameter(vectors) for vectors in initial)

    def forward(ids: Tensor) -> Tensor:
        frozen = functional.embedding(ids, table.weight)
        learned = torch.cat([*rows]).to(frozen.dtype)
        row = (ids - count).clamp(min=0, max=len(learned) - 1)
        return torch.where((ids >= count)[..., None], functional.embedding(row, learned), frozen)

    table.add_module(_SUBMODULE_NAME, rows)  # as a submodule, so that DDP finds the parameters
    forwards.replace(table, forward)
    return {
        f"{component}.{_SUBMODULE_NAME}.{token.placeholder_token}": row for token, row in zip(tokens, rows, strict=True)
    }


def _vector_norms(vectors: Tensor) -> Tensor:
    """Return the norm (n, 1) of each vector (n, width)."""
    return vectors.square().sum(dim=1, keepdim=True).sqrt()


class TextualInversionCallbacks(MethodCallbacks):
    """Decides when tokens and adapter are trained, and restores the norm of each vector after each step.

    Args:
        tokens: Parameters of the learned tokens.
        others: All other trained parameters.
        config: Settings `start_adapter_at`, the fraction of the run in which only the tokens are trained, and
            `freeze_tokens_at`, the fraction after which they are frozen.
        steps: Number of steps of the run.
    """

    def __init__(
        self,
        tokens: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        config: TextualInversionConfig,
        steps: int,
    ) -> None:
        self.tokens, self.others = tokens, others
        self.start_adapter_step = config.start_adapter_at * steps
        self.freeze_tokens_step = config.freeze_tokens_at * steps
        self.norms = {name: _vector_norms(vectors.detach()) for name, vectors in tokens.items()}

    def frozen_parameters(self, step: int) -> Iterable[nn.Parameter]:
        """Return the other parameters until the adapter starts, and the tokens once they are frozen."""
        others = self.others.values() if step < self.start_adapter_step else ()
        return (*others, *(self.tokens.values() if step >= self.freeze_tokens_step else ()))

    def is_stable(self, step: int) -> bool:
        """Return whether the adapter, if there is one, has started to learn."""
        return not self.others or step > self.start_adapter_step

    @torch.no_grad()
    def after_step(self, step: int, rate_of: RateOf) -> None:  # noqa: ARG002 (the same at every step)
        """Scale each vector to its initial norm."""
        for name, vectors in self.tokens.items():
            vectors.mul_(self.norms[name] / _vector_norms(vectors))

    def report(self) -> dict[str, Any]:
        """Return the learned tokens."""
        return {"tokens": list(dict.fromkeys(name.split(".", 2)[2] for name in self.tokens))}
