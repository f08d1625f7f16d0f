"""What is learned of words: vectors of words themselves, and sliders between prompts."""

from typing import Annotated

from pydantic import Field, model_validator

from lora_diffusion.config.adapter import AboveZero, Share
from lora_diffusion.config.settings import Settings


class TextualInversionConfig(Settings):
    """Settings of textual inversion, alone or before an adapter (pivotal tuning)."""

    placeholder_tokens: tuple[str, ...] = ()
    """New tokens to train, as they appear in the captions; none by default."""
    num_vectors: Annotated[int, Field(ge=1, le=32)] = 1
    """Vectors per token; more vectors hold more detail and overfit more easily."""
    initializer_token: str = ""
    """Existing word whose vectors initialize the tokens, such as `style` or `dog`; noise if left out."""
    start_adapter_at: Share = 0.0
    """Share of the run in which only the tokens are trained; 1 trains no adapter at all."""
    freeze_tokens_at: Share = 1.0
    """Share of the run after which the tokens are frozen."""

    @model_validator(mode="after")
    def check_schedule(self) -> "TextualInversionConfig":
        """Refuse settings under which no token would be trained."""
        if not self.placeholder_tokens and self != TextualInversionConfig.model_construct(placeholder_tokens=()):
            raise ValueError(
                "num_vectors, initializer_token, start_adapter_at and freeze_tokens_at configure placeholder_tokens; "
                "name the tokens in textual_inversion.placeholder_tokens"
            )
        if self.freeze_tokens_at < self.start_adapter_at:
            raise ValueError(
                f"freeze_tokens_at is {self.freeze_tokens_at} and start_adapter_at {self.start_adapter_at}; nothing "
                "would be trained in between"
            )
        if any(not word.strip() or " " in word.strip() for word in self.placeholder_tokens):
            raise ValueError("a learned token has no spaces in it; write one such as 'sks'")
        return self


class SliderConfig(Settings):
    """A signed attribute learned from prompts [arXiv 2311.12092]: the adapter adds it at 1 and takes it away at -1."""

    positive: str = ""
    """What is more of it, such as `a house at night`; empty trains no slider."""
    negative: str = ""
    """What is less of it, such as `a house in the sun`."""
    target: str = ""
    """What it is learned on, such as `a house`."""
    strength: AboveZero = 1.0
    """How far weight 1 goes along the difference of the two."""

    @model_validator(mode="after")
    def check_ends(self) -> "SliderConfig":
        """Refuse a slider without two different ends."""
        if (self.negative or self.target) and not self.positive:
            raise ValueError("negative and target are of a slider; name what is more of it in positive")
        if self.positive and self.positive == self.negative:
            raise ValueError("positive and negative say the same, so there is nothing in between")
        return self
