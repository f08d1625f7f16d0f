"""Prior preservation: preserve what the base generates for other prompts, by class pictures or its own predictions.

With class pictures (DreamBooth, arXiv:2208.12242) the run also trains on pictures of the class, which the base
generates. The alternative needs no pictures: a loss on other prompts keeps the adapted predictions close to those of
the frozen base.
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
    """Return the folder of the class pictures.

    Raises:
        ConfigError: `prior.prompt` is empty.
    """
    if not config.prompt:
        raise ConfigError(
            "prior.mode is 'pictures', but prior.prompt is empty; set it to a prompt for the class pictures, such as "
            "'photo of a dog'"
        )
    return config.folder or run_folder / "class"


def make_class_pictures(base: Base, config: PriorConfig, folder: Path, size_px: int, *, share: int, of: int) -> None:
    """Generate the class pictures that do not exist yet; an interrupted call can be repeated.

    Args:
        base: The base that generates them.
        config: Prompt, number of pictures and sampling settings.
        folder: Where to save them; created if missing.
        size_px: Width and height.
        share: Index of this process, which generates every `of`-th missing picture.
        of: Number of processes.

    Raises:
        ConfigError: The sampling settings are invalid.
        SamplingError: A picture could not be generated.
        OutputError: A picture could not be saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(missing_pictures(config, folder)[share::of], desc="class pictures", unit="picture", leave=False):
        settings = GenerateConfig(
            prompt=config.prompt,
            seed=seed,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
            width=size_px,
            height=size_px,
        )
        generate(base, [settings])[0].save(folder / _picture_name(seed))


def missing_pictures(config: PriorConfig, folder: Path) -> list[int]:
    """List the seeds of the class pictures that do not exist yet."""
    return [seed for seed in range(config.count) if not (folder / _picture_name(seed)).is_file()]


def _picture_name(seed: int) -> str:
    """Return the file name of the class picture of a seed."""
    return f"class-{seed:05d}.png"


class PriorPreservationLoss:
    """Squared distance between adapted and frozen predictions on other prompts, at the noisy latents of the batch.

    Args:
        encoder: Encodes the prompts with the frozen text encoders.
        config: The prompts and the weight of the loss.
    """

    def __init__(self, encoder: CaptionEncoder, config: PriorConfig) -> None:
        self.encoder = encoder
        self.prompts: Sequence[str] = config.prompts or (config.prompt,)
        self.weight = config.weight

    def compute_losses(
        self, denoiser: Denoiser, latent: Tensor, noise: Tensor, timestep: Tensor, time_ids: Tensor
    ) -> Tensor:
        """Compute the weighted losses (n,) of a batch; the timestep of a sample selects its prompt.

        Args:
            denoiser: Predicts with the base.
            latent: Latents (n, c, h, w).
            noise: (n, c, h, w).
            timestep: (n,), int64.
            time_ids: SDXL's size and crop conditioning (n, 6).
        """
        prompts = [self.prompts[int(t) % len(self.prompts)] for t in timestep]
        frozen, adapted = predict_both(denoiser, self.encoder, prompts, (latent, noise, timestep), time_ids)
        return self.weight * (adapted - frozen).square().mean(dim=(1, 2, 3))


def predict_both(
    denoiser: Denoiser,
    encoder: CaptionEncoder,
    prompts: Sequence[str],
    noisy: tuple[Tensor, Tensor, Tensor],
    time_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Predict with the frozen base and with the adapted one.

    Args:
        denoiser: Predicts with the base.
        encoder: Encodes the prompts with the frozen text encoders.
        prompts: One prompt per sample.
        noisy: Latents (n, c, h, w), noise (n, c, h, w) and timesteps (n,).
        time_ids: SDXL's size and crop conditioning (n, 6).

    Returns:
        The prediction of the frozen base, without gradients, and that of the adapted one, each (n, c, h, w) in float32.
    """
    tensors = {key: value.to(noisy[0].device) for key, value in encoder.encode_batch(prompts).items()}
    context = make_context(tensors["hidden"], tensors.get("pooled"), time_ids)
    with torch.no_grad(), adapter_disabled(denoiser.base):
        frozen = denoiser.predict(*noisy, context).float()
    adapted = denoiser.predict(*noisy, denoiser.encode_trained_context(prompts, time_ids, context)).float()
    return frozen, adapted
