"""Move the VAE and the text encoders to the CPU while the UNet trains, to save GPU memory."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora_diffusion.models.load import Base


def list_idle_models(base: Base, *, text_encoders_learn: bool) -> list[str]:
    """List the models that a training step does not run while latents and text embeddings are cached.

    Args:
        base: The base that is trained on.
        text_encoders_learn: Whether the text encoders are trained, so that every step runs them.

    Returns:
        Attribute names of the pipeline, such as `vae` and `text_encoder`.
    """
    return ["vae", *(() if text_encoders_learn else base.layout.text_layers)]


def offload(base: Base, names: Sequence[str]) -> None:
    """Move models of the pipeline, given by attribute name, to the CPU and free their GPU memory."""
    for name in names:
        getattr(base.pipe, name).to("cpu")
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def on_device(base: Base, names: Sequence[str]) -> Generator[None]:
    """Keep models on the base's device inside the block, and offload those again that were offloaded before it."""
    models: list[nn.Module] = [getattr(base.pipe, name) for name in names]
    offloaded = [
        name for name, model in zip(names, models, strict=True) if next(model.parameters()).device != base.device
    ]
    for name in offloaded:
        getattr(base.pipe, name).to(base.device)
    try:
        yield
    finally:
        if offloaded:
            offload(base, offloaded)
