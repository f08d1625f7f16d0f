"""Checks of settings and captions that run before the base is loaded."""

import re
from collections.abc import Sequence
from importlib.util import find_spec

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.data.captions import caption_parser, format_caption
from lora_diffusion.data.folder import Example
from lora_diffusion.errors import ConfigError, DatasetError


def check_views(config: TrainConfig) -> None:
    """Raise ConfigError if `data.flip` is on but only the first, unflipped view of each image is cached."""
    if config.data.flip and config.data.variants == 1 and config.data.cache != "none":
        raise ConfigError(
            "data.flip mirrors every second view of an image, but only one is cached; set data.variants to 2 or more"
        )


def check_captions(examples: Sequence[Example], config: TrainConfig) -> None:
    """Check that every caption can be parsed as a prompt.

    If captions are shuffled or tags are dropped, each tag is parsed on its own as well.

    Raises:
        DatasetError: For the first caption that cannot be parsed; the message names its image.
    """
    parse = caption_parser(config.captions)
    split = config.captions.shuffle or config.captions.tag_dropout
    for example in examples:
        text = format_caption(example.caption, config.captions, config.trigger_words)
        try:
            for part in text.split(config.captions.separator) if split else [text]:
                parse(part)
        except ConfigError as error:
            raise DatasetError(f"{example.picture}: its caption cannot be parsed as a prompt: {error}") from None


def check_learned_tokens(examples: Sequence[Example], config: TrainConfig) -> None:
    """Raise ConfigError if a textual-inversion token (`textual_inversion.placeholder_tokens`) occurs in no caption."""
    texts = " ".join(format_caption(example.caption, config.captions, config.trigger_words) for example in examples)
    for word in config.textual_inversion.placeholder_tokens:
        if not re.search(rf"(?<![\w/]){re.escape(word)}(?![\w/])", texts):
            raise ConfigError(
                f"textual_inversion.placeholder_tokens: {word!r} occurs in no caption, so its embedding cannot "
                "be trained; add it to the captions or to captions.template (data.instance_prompt only "
                "applies to images without a caption)"
            )


def check_tracker(name: str) -> str:
    """Return the name of a tracker; raise ConfigError if the package it needs is not installed."""
    if name == "wandb" and find_spec("wandb") is None:
        raise ConfigError(
            "tracking.trackers contains 'wandb', but wandb is not installed; run pip install wandb, or remove it "
            "from tracking.trackers"
        )
    return name
