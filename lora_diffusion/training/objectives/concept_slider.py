"""Sliders: an adapter that is an attribute, learned from prompts, with a sign [arXiv:2311.12092].

At weight s, +1 or -1, the adapted base shall say of the target prompt what the frozen one says of it, moved along the
difference of two prompts:

    e*(x, target) = e(x, target) + s * strength * (e(x, positive) - e(x, negative))

Pictures only tell at which noisy latents this is learned; their captions are not read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lora_diffusion.config.train import SliderConfig
from lora_diffusion.models.load import Base
from lora_diffusion.models.text_encoding import TextContext
from lora_diffusion.training.inputs.captions import CaptionEncoder, make_context
from lora_diffusion.training.methods.injection import adapter_disabled, adapter_state_of
from lora_diffusion.training.objectives.denoiser import Denoiser

SIGNS = (1.0, -1.0)


class ConceptSliderLoss:
    """The losses of both signs, in place of the pictures' own."""

    def __init__(self, base: Base, encoder: CaptionEncoder, config: SliderConfig) -> None:
        self.base, self.encoder, self.config = base, encoder, config
        self.read: dict[str, dict[str, Tensor]] = {}

    def compute_losses(
        self, denoiser: Denoiser, latent: Tensor, noise: Tensor, timestep: Tensor, time_ids: Tensor
    ) -> Tensor:
        """(n,) losses, the mean of both signs."""

        def predict(text: str) -> Tensor:
            context = self.context(text, latent, time_ids)
            return denoiser.predict(latent, noise, timestep, context).float()

        config = self.config
        with torch.no_grad(), adapter_disabled(self.base):
            plain, direction = predict(config.target), predict(config.positive) - predict(config.negative)
        total = torch.zeros(len(latent), device=latent.device)
        for sign in SIGNS:
            with adapter_weight(self.base, sign):
                error = predict(config.target) - (plain + sign * config.strength * direction)
            total = total + error.square().mean(dim=(1, 2, 3))
        return total / len(SIGNS)

    def context(self, text: str, latent: Tensor, time_ids: Tensor) -> TextContext:
        """One prompt, which is read once, for all latents of a batch."""
        if text not in self.read:
            self.read[text] = {key: value.to(latent.device) for key, value in self.encoder.encode_batch([text]).items()}
        texts = {key: value.expand(len(latent), *value.shape[1:]) for key, value in self.read[text].items()}
        return make_context(texts["hidden"], texts.get("pooled"), time_ids)


@contextmanager
def adapter_weight(base: Base, weight: float) -> Iterator[None]:
    """The trained updates at a weight, while the block runs."""
    state = adapter_state_of(base)
    with state.overridden(replace(state.now, weight=weight)):
        yield
