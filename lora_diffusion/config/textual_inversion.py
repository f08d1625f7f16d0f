"""What is learned of words: vectors of words themselves, and sliders between prompts."""

from typing import Annotated

from pydantic import Field, model_validator

from lora_diffusion.config.adapter import AboveZero, Share
from lora_diffusion.config.settings import Settings


class TextualInversionConfig(Settings):
    """Words whose vectors are learned: textual inversion, alone or before an adapter (pivotal tuning)."""

    words: tuple[str, ...] = ()
    """The words, as they stand in the captions; none by default."""
    vectors: Annotated[int, Field(ge=1, le=32)] = 1
    """Vectors of each word; more hold more, and more easily say too much."""
    begin_as: str = ""
    """Word whose vectors they begin as, such as `style` or `dog`; noise if left out."""
    alone: Share = 0.0
    """Share of the run in which only the words learn; 1 trains no adapter at all."""
    until: Share = 1.0
    """Share of the run after which the words stay as they are."""

    @model_validator(mode="after")
    def check_schedule(self) -> "TextualInversionConfig":
        """Refuse what would train nothing, or say something of no words."""
        if not self.words and self != TextualInversionConfig.model_construct(words=()):
            raise ValueError("vectors, begin_as, alone and until say something of words; name them in words.words")
        if self.until < self.alone:
            raise ValueError(f"until is {self.until} and alone {self.alone}; nothing would learn in between")
        if any(not word.strip() or " " in word.strip() for word in self.words):
            raise ValueError("a learned word has no spaces in it; write one such as 'sks'")
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
        """A slider has two different ends."""
        if (self.negative or self.target) and not self.positive:
            raise ValueError("negative and target are of a slider; name what is more of it in positive")
        if self.positive and self.positive == self.negative:
            raise ValueError("positive and negative say the same, so there is nothing in between")
        return self
