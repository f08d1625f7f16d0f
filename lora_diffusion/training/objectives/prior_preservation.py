"""What keeps the base's own knowledge: class pictures (DreamBooth), or a pull towards its own predictions.

Class pictures are of [arXiv:2208.12242]; the pull needs none, and holds prompts apart from the trained ones in place.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.train import PriorConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base
from lora_diffusion.training.inputs.captions import CaptionEncoder, make_context
from lora_diffusion.training.methods.injection import adapter_disabled
from lora_diffusion.training.objectives.denoiser import Denoiser


def class_folder(config: PriorConfig, run_folder: Path) -> Path:
    """Where class pictures are. Raises ConfigError if nothing says what they show."""
    if not config.prompt:
        raise ConfigError(
            "prior.mode 'pictures' needs prior.prompt, what class pictures show, such as 'photo of a dog'"
        )
    return config.folder or run_folder / "class"


def make_class_pictures(base: Base, config: PriorConfig, folder: Path, size_px: int, *, share: int, of: int) -> None:
    """Make those class pictures that are missing, by seed; several processes take turns. Goes on where it was stopped.

    Raises ConfigError, SamplingError, OutputError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(missing_pictures(config, folder)[share::of], desc="class pictures", unit="picture", leave=False):
        settings = GenerateConfig(
            prompt=config.prompt, seed=seed, guidance=config.guidance, steps=config.steps, width=size_px, height=size_px
        )
        generate(base, [settings])[0].save(folder / picture_name(seed))


def missing_pictures(config: PriorConfig, folder: Path) -> list[int]:
    """The seeds of class pictures that are not there."""
    return [seed for seed in range(config.count) if not (folder / picture_name(seed)).is_file()]


def picture_name(seed: int) -> str:
    return f"class-{seed:05d}.png"


class PriorPreservationLoss:
    """Losses of the adapted prediction against the frozen base's own, at the same noisy latents, on other prompts."""

    def __init__(self, encoder: CaptionEncoder, config: PriorConfig) -> None:
        self.encoder = encoder
        self.prompts: Sequence[str] = config.prompts or (config.prompt,)
        self.weight = config.weight

    def compute_losses(
        self, denoiser: Denoiser, latent: Tensor, noise: Tensor, timestep: Tensor, time_ids: Tensor
    ) -> Tensor:
        """(n,) weighted losses; each sample takes one of the prompts in turn."""
        chosen = [self.prompts[int(t) % len(self.prompts)] for t in timestep]
        frozen, moved = predict_both(denoiser, self.encoder, chosen, (latent, noise, timestep), time_ids)
        return self.weight * (moved - frozen).square().mean(dim=(1, 2, 3))


def predict_both(
    denoiser: Denoiser,
    encoder: CaptionEncoder,
    prompts: Sequence[str],
    noisy: tuple[Tensor, Tensor, Tensor],
    time_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the frozen base and the adapted one say of latents, noise and timesteps on other prompts, float32."""
    texts = {key: value.to(noisy[0].device) for key, value in encoder.encode_batch(prompts).items()}
    context = make_context(texts["hidden"], texts.get("pooled"), time_ids)
    with torch.no_grad(), adapter_disabled(denoiser.base):
        frozen = denoiser.predict(*noisy, context).float()
    moved = denoiser.predict(*noisy, denoiser.encode_trained_context(prompts, time_ids, context)).float()
    return frozen, moved
