"""Mistakes in settings and captions that are found before a base is loaded."""

import re
from collections.abc import Sequence
from importlib.util import find_spec

from lora_diffusion.config.train import TrainConfig
from lora_diffusion.data.captions import caption_parser, format_caption
from lora_diffusion.data.folder import Example
from lora_diffusion.errors import ConfigError, DatasetError


def check_views(config: TrainConfig) -> None:
    """Raise ConfigError for mirrored views that would never be seen."""
    if config.data.flip and config.data.variants == 1 and config.data.cache != "none":
        raise ConfigError("data.flip mirrors every other view, and only one is cached; set data.variants to 2 or more")


def check_captions(examples: Sequence[Example], config: TrainConfig) -> None:
    """Raise DatasetError for a caption, or a part of it that may come alone, that cannot be read."""
    read, divided = caption_parser(config.captions), config.captions.shuffle or config.captions.part_dropout
    for example in examples:
        text = format_caption(example.caption, config.captions, config.trigger_words)
        try:
            for part in text.split(config.captions.separator) if divided else [text]:
                read(part)
        except ConfigError as error:
            raise DatasetError(f"{example.picture}: its caption cannot be read as a prompt: {error}") from None


def check_learned_tokens(examples: Sequence[Example], config: TrainConfig) -> None:
    """Raise ConfigError for a word that is to be learned and stands in no caption."""
    texts = " ".join(format_caption(example.caption, config.captions, config.trigger_words) for example in examples)
    for word in config.words.words:
        if not re.search(rf"(?<![\w/]){re.escape(word)}(?![\w/])", texts):
            raise ConfigError(
                f"words.words: {word!r} stands in no caption, so nothing would teach it; put it there, or into "
                "captions.template (an instance prompt is for pictures without a caption)"
            )


def check_tracker(name: str) -> str:
    """Raise ConfigError for a tracker that is not installed."""
    if name == "wandb" and find_spec("wandb") is None:
        raise ConfigError("tracking.trackers names wandb, which is not installed; pip install wandb, or leave it out")
    return name
