"""Pictures as the autoencoder sees them, with the mask and the measures that go with them."""

from dataclasses import dataclass
from typing import Any

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
    """One view of a picture, encoded."""

    mean: Tensor
    """Of the scaled latents (c, h, w), float32."""
    std: Tensor
    mask: Tensor
    """Where the loss counts, (1, h, w)."""
    time_ids: Tensor
    """Original height and width, top and left of the cut, height and width of the bucket: what SDXL is told of."""


class ViewEncoder:
    """Encodes views, once each where a cache is given."""

    def __init__(self, base: Base, config: DataConfig, cache: Cache) -> None:
        self.base, self.config, self.cache = base, config, cache
        self.identity = base.hash

    def encode(self, example: Example, bucket: Bucket, *, seed: int, variant: int) -> LatentView:
        """Raises DatasetError for a picture that cannot be read."""
        looks = {"seed": seed, "variant": variant}
        key = content_key("latents", self.identity, make_view_key(example, bucket, self.config, **looks))
        found = self.cache.get(key, lambda: self.encode_tensors(make_view(example, bucket, self.config, **looks)))
        return LatentView(**found)

    def encode_tensors(self, seen: View) -> Tensors:
        with on_device(self.base, ["vae"]):
            mean, std = encode_picture(self.base, seen.pixels)
        height, width = seen.pixels.shape[1:]
        whole = torch.ones(height, width) if seen.mask is None else seen.mask
        mask = functional.interpolate(whole[None, None], size=mean.shape[1:], mode="area")[0]
        sizes = [seen.original_size[1], seen.original_size[0], *seen.crop, height, width]
        return {"mean": mean, "std": std, "mask": mask, "time_ids": torch.tensor(sizes, dtype=torch.float32)}


@torch.no_grad()
def encode_picture(base: Base, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents (c, h, w) of a picture (3, height, width) in -1..1."""
    vae: Any = base.pipe.vae
    posterior = vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return posterior.mean[0].float().cpu() * scale, posterior.std[0].float().cpu() * scale
