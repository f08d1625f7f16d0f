"""Settings of textual inversion, and of concept sliders between two prompts."""

from typing import Annotated

from pydantic import Field, model_validator

from lora_diffusion.config.adapter import AboveZero, Share
from lora_diffusion.config.settings import Settings


class TextualInversionConfig(Settings):
    """Settings of textual inversion, alone or before an adapter (pivotal tuning)."""

    placeholder_tokens: tuple[str, ...] = ()
    """New tokens to train, as they appear in the captions, such as `sks`; none by default."""
    num_vectors: Annotated[int, Field(ge=1, le=32)] = 1
    """Vectors per token; more vectors hold more detail and overfit more easily."""
    initializer_token: str = ""
    """Existing word whose embedding initializes the tokens, such as `style` or `dog`; random by default."""
    start_adapter_at: Share = 0.0
    """Fraction of the run in which only the tokens are trained; 1 trains no adapter at all."""
    freeze_tokens_at: Share = 1.0
    """Fraction of the run after which the tokens are frozen."""

    @model_validator(mode="after")
    def check_schedule(self) -> "TextualInversionConfig":
        """Refuse settings under which no token would be trained."""
        if not self.placeholder_tokens and self != TextualInversionConfig.model_construct(placeholder_tokens=()):
            raise ValueError(
                "num_vectors, initializer_token, start_adapter_at and freeze_tokens_at have no effect without tokens; "
                "name the tokens in textual_inversion.placeholder_tokens"
            )
        if self.freeze_tokens_at < self.start_adapter_at:
            raise ValueError(
                f"freeze_tokens_at is {self.freeze_tokens_at} and start_adapter_at {self.start_adapter_at}; nothing "
                "would be trained in between; set freeze_tokens_at to at least start_adapter_at"
            )
        if any(not word.strip() or " " in word.strip() for word in self.placeholder_tokens):
            raise ValueError("placeholder_tokens must not contain spaces; expected a single word such as 'sks'")
        return self


class SliderConfig(Settings):
    """Concept slider [arXiv 2311.12092]: an adapter that adds an attribute at weight 1 and removes it at -1."""

    positive: str = ""
    """Prompt with more of the attribute, such as `a house at night`; empty trains no slider."""
    negative: str = ""
    """Prompt with less of the attribute, such as `a house in the sun`."""
    target: str = ""
    """Prompt on which the attribute is trained, such as `a house`."""
    strength: AboveZero = 1.0
    """Multiplier of the difference between the two prompts' predictions that weight 1 adds."""

    @model_validator(mode="after")
    def check_ends(self) -> "SliderConfig":
        """Refuse a slider without two different prompts."""
        if (self.negative or self.target) and not self.positive:
            raise ValueError("negative and target have no effect without positive; set slider.positive")
        if self.positive and self.positive == self.negative:
            raise ValueError("positive and negative are the same prompt; a slider needs two different ones")
        return self
