"""Models that a step does not need wait in the processor's memory, and are on the device only while they work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_diffusion.models.load import Base


def list_idle_models(base: Base, *, text_encoders_learn: bool) -> list[str]:
    """What a step does not need while encoded pictures and captions come from the cache."""
    return ["vae", *(() if text_encoders_learn else base.layout.text_layers)]


def offload(base: Base, names: Sequence[str]) -> None:
    """Move models off the device."""
    for name in names:
        getattr(base.pipe, name).to("cpu")
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def on_device(base: Base, names: Sequence[str]) -> Iterator[None]:
    """Models on the base's device while the block runs, and where they were afterwards."""
    models: list[nn.Module] = [getattr(base.pipe, name) for name in names]
    away = [name for name, model in zip(names, models, strict=True) if next(model.parameters()).device != base.device]
    for name in away:
        getattr(base.pipe, name).to(base.device)
    try:
        yield
    finally:
        if away:
            offload(base, away)
