"""What a training step minimises: target, noise schedule and parametrisation together."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.models import Base, encode_prompts, prediction_type


class Denoiser(nn.Module):
    """The trainable parts of a base, with the loss as its forward pass.

    Gives one loss per sample, so that the loop never learns what is predicted.
    """

    def __init__(self, base: Base, size_px: int):
        super().__init__()
        self.unet: nn.Module = base.pipe.unet
        self.text_encoders = nn.ModuleList(getattr(base.pipe, name) for name in base.anatomy.text_layers)
        self.predicts = prediction_type(base)
        self.base = base
        self.size_px = size_px
        self.alphas_cumprod: Tensor = base.pipe.scheduler.alphas_cumprod.to(base.pipe.device)
        self.num_timesteps = len(self.alphas_cumprod)

    def forward(self, latent: Tensor, noise: Tensor, timestep: Tensor, caption: list[str]) -> Tensor:
        """(n,) mean squared errors for latents and noise (n, c, h, w) and timesteps (n,)."""
        alpha_bar = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noisy = signal * latent + sigma * noise
        context = encode_prompts(self.base, caption, size_px=self.size_px)
        predicted = self.unet(
            noisy.to(next(self.unet.parameters()).dtype),
            timestep,
            encoder_hidden_states=context.hidden,
            added_cond_kwargs=context.added,
        ).sample
        target = noise if self.predicts == "epsilon" else signal * noise - sigma * latent
        return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def encode_picture(base: Base, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents (c, h, w) of a picture (3, height, width) in -1..1."""
    vae: Any = base.pipe.vae
    posterior = vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return posterior.mean[0].float().cpu() * scale, posterior.std[0].float().cpu() * scale
