"""What becomes of a caption before a step sees it: template, order of its parts, dropout."""

import torch
from torch import Generator

from lora_diffusion.config.train import CaptionConfig
from lora_diffusion.prompts.emphasis import ReadText, parse_emphasis, parse_literal


def augment_caption(caption: str, config: CaptionConfig, trigger_words: tuple[str, ...], rng: Generator) -> str:
    """The caption for one sample. Draws the same number of random numbers whatever comes of them."""
    dropped = bool(torch.rand((), generator=rng) < config.dropout)
    parts = [part.strip() for part in caption.split(config.separator)]
    chances = torch.rand(len(parts), generator=rng)
    order = torch.randperm(len(parts), generator=rng).tolist()
    kept = [i for i in range(len(parts)) if i < config.keep or chances[i] >= config.part_dropout]
    if config.shuffle:
        moved = iter([i for i in order if i in kept and i >= config.keep])
        kept = [i if i < config.keep else next(moved) for i in kept]
    untouched = not (config.shuffle or config.part_dropout)
    text = caption if untouched else f"{config.separator} ".join(parts[i] for i in kept)
    filled = config.template.replace("{caption}", text).replace("{trigger}", " ".join(trigger_words))
    return "" if dropped else filled.strip()


def format_caption(caption: str, config: CaptionConfig, trigger_words: tuple[str, ...]) -> str:
    """The caption with nothing left to chance: all its parts, in their order."""
    unchanged = config.model_copy(update={"dropout": 0.0, "part_dropout": 0.0, "shuffle": False})
    return augment_caption(caption, unchanged, trigger_words, Generator())


def caption_parser(config: CaptionConfig) -> ReadText:
    """What notation captions are in."""
    return parse_emphasis if config.weights else parse_literal
