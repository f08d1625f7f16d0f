"""Augment captions for training: template, tag shuffling, tag dropout and caption dropout."""

import torch
from torch import Generator

from lora_diffusion.config.train import CaptionConfig
from lora_diffusion.prompts.emphasis import ReadText, parse_emphasis, parse_literal


def augment_caption(caption: str, config: CaptionConfig, trigger_words: tuple[str, ...], rng: Generator) -> str:
    """Return the caption of one training sample.

    All random numbers are always drawn, so that turning on one kind of dropout does not change the other choices.

    Args:
        caption: The caption as it was read.
        config: The caption settings.
        trigger_words: The words that replace `{trigger}` in the template.
        rng: The random number generator, which is advanced.

    Returns:
        The augmented caption, or the empty caption with probability `config.dropout`.
    """
    dropped = bool(torch.rand((), generator=rng) < config.dropout)
    tags = [tag.strip() for tag in caption.split(config.separator)]
    draws = torch.rand(len(tags), generator=rng)
    order = [int(i) for i in torch.randperm(len(tags), generator=rng)]
    chosen = [i for i in range(len(tags)) if i < config.keep_tokens or draws[i] >= config.tag_dropout]
    if config.shuffle:
        shuffled = iter([i for i in order if i in chosen and i >= config.keep_tokens])
        chosen = [i if i < config.keep_tokens else next(shuffled) for i in chosen]
    unchanged = not (config.shuffle or config.tag_dropout)
    text = caption if unchanged else f"{config.separator} ".join(tags[i] for i in chosen)
    filled = config.template.replace("{caption}", text).replace("{trigger}", " ".join(trigger_words))
    return "" if dropped else filled.strip()


def format_caption(caption: str, config: CaptionConfig, trigger_words: tuple[str, ...]) -> str:
    """Fill the template without any random change: all tags, in their original order."""
    without_dropout = config.model_copy(update={"dropout": 0.0, "tag_dropout": 0.0, "shuffle": False})
    return augment_caption(caption, without_dropout, trigger_words, Generator())


def caption_parser(config: CaptionConfig) -> ReadText:
    """Return the parser of captions: with emphasis such as `(red:1.3)` if `config.weights`, or else literal."""
    return parse_emphasis if config.weights else parse_literal
