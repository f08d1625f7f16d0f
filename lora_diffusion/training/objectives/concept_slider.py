"""Concept sliders [arXiv:2311.12092]: an adapter for one attribute, trained from prompts instead of captions.

With weight s = +1 or -1, the adapted model is trained to predict for the target prompt what the frozen base predicts
for it, shifted along the difference of two prompts:

    e*(x, target) = e(x, target) + s * strength * (e(x, positive) - e(x, negative))

The training pictures only provide the noisy latents x; their captions are not used.
"""

from collections.abc import Generator
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

_SIGNS = (1.0, -1.0)


class ConceptSliderLoss:
    """The concept slider loss, which replaces the denoising loss of the pictures.

    Args:
        base: The base with the trainable layers.
        encoder: Encodes the three prompts.
        config: The prompts and the strength.
    """

    def __init__(self, base: Base, encoder: CaptionEncoder, config: SliderConfig) -> None:
        self.base, self.encoder, self.config = base, encoder, config
        self.encoded_prompts: dict[str, dict[str, Tensor]] = {}

    def compute_losses(
        self, denoiser: Denoiser, latent: Tensor, noise: Tensor, timestep: Tensor, time_ids: Tensor
    ) -> Tensor:
        """Compute the losses (n,) of a batch, the mean over both signs.

        Args:
            denoiser: Predicts with the base.
            latent: Latents of the pictures (n, c, h, w).
            noise: (n, c, h, w).
            timestep: (n,), int64.
            time_ids: SDXL's size and crop conditioning (n, 6).
        """

        def predict(text: str) -> Tensor:
            context = self.context(text, latent, time_ids)
            return denoiser.predict(latent, noise, timestep, context).float()

        config = self.config
        with torch.no_grad(), adapter_disabled(self.base):
            base_prediction, direction = predict(config.target), predict(config.positive) - predict(config.negative)
        losses = torch.zeros(len(latent), device=latent.device)
        for sign in _SIGNS:
            with adapter_weight(self.base, sign):
                error = predict(config.target) - (base_prediction + sign * config.strength * direction)
            losses = losses + error.square().mean(dim=(1, 2, 3))
        return losses / len(_SIGNS)

    def context(self, text: str, latent: Tensor, time_ids: Tensor) -> TextContext:
        """Return the conditioning of one prompt for a batch of latents; each prompt is encoded once per run."""
        if text not in self.encoded_prompts:
            self.encoded_prompts[text] = {
                key: value.to(latent.device) for key, value in self.encoder.encode_batch([text]).items()
            }
        tensors = {
            key: value.expand(len(latent), *value.shape[1:]) for key, value in self.encoded_prompts[text].items()
        }
        return make_context(tensors["hidden"], tensors.get("pooled"), time_ids)


@contextmanager
def adapter_weight(base: Base, weight: float) -> Generator[None]:
    """Set the weight of all trainable layers of a base inside the context."""
    state = adapter_state_of(base)
    with state.override(replace(state.current, weight=weight)):
        yield
