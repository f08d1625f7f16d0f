"""Encode training images to latents with the VAE, together with their loss masks and SDXL's size conditioning."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from lora_diffusion.config.train import DataConfig
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.folder import Example
from lora_diffusion.data.transforms import View, make_view, make_view_key
from lora_diffusion.models.load import Base
from lora_diffusion.models.offload import on_device
from lora_diffusion.training.inputs.cache import Cache, Tensors, content_key


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentView:
    """Encoded view of an image: one particular crop, flip and color change of it."""

    mean: Tensor = field(repr=False)
    """Mean of the scaled latents' distribution, (c, h, w), float32."""
    std: Tensor = field(repr=False)
    """Standard deviation of the same, (c, h, w), float32."""
    mask: Tensor = field(repr=False)
    """Weight of the loss at each latent pixel, (1, h, w), in 0..1."""
    time_ids: Tensor = field(repr=False)
    """SDXL's size and crop conditioning, (6,): original height and width, top and left of the crop, height and width
    of the bucket."""


class ViewEncoder:
    """Encoder of image views, with a cache.

    Args:
        base: The base whose VAE is used.
        config: How images are cropped and augmented.
        cache: Where encoded views are stored.
    """

    def __init__(self, base: Base, config: DataConfig, cache: Cache) -> None:
        self.base, self.config, self.cache = base, config, cache
        self.identity = base.hash

    def encode(self, example: Example, bucket: Bucket, *, seed: int, variant: int) -> LatentView:
        """Encode one view of an image.

        Args:
            example: The image.
            bucket: Size that the image is cropped to.
            seed: Seed of the image's random crops and changes.
            variant: Number of the view; different numbers give different crops and changes.

        Raises:
            DatasetError: If the image cannot be read.
        """
        augmentation = {"seed": seed, "variant": variant}
        key = content_key("latents", self.identity, make_view_key(example, bucket, self.config, **augmentation))
        tensors = self.cache.get(
            key, lambda: self._encode_tensors(make_view(example, bucket, self.config, **augmentation))
        )
        return LatentView(**tensors)

    def _encode_tensors(self, view: View) -> Tensors:
        with on_device(self.base, ["vae"]):
            mean, std = _encode_image(self.base, view.pixels)
        height, width = view.pixels.shape[1:]
        pixel_mask = torch.ones(height, width) if view.mask is None else view.mask
        mask = functional.interpolate(pixel_mask[None, None], size=mean.shape[1:], mode="area")[0]
        sizes = [view.original_size[1], view.original_size[0], *view.crop, height, width]
        return {"mean": mean, "std": std, "mask": mask, "time_ids": torch.tensor(sizes, dtype=torch.float32)}


@torch.no_grad()
def _encode_image(base: Base, image: Tensor) -> tuple[Tensor, Tensor]:
    """Encode an image (3, height, width) in -1..1; return mean and standard deviation of the latents, (c, h, w)."""
    vae: Any = cast(Any, base.vae)
    posterior = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return posterior.mean[0].float().cpu() * scale, posterior.std[0].float().cpu() * scale
