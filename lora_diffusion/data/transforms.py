"""A picture as a model is shown it: cut to its bucket, perhaps mirrored and with other colors; a mask goes with it."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Generator, Tensor

from lora_diffusion.config.train import DataConfig
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.folder import Example
from lora_diffusion.data.images import read_alpha, read_mask, read_picture, read_size

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, kw_only=True)
class View:
    """What is seen of a picture."""

    pixels: Tensor
    """(3, height, width) float32 in -1..1."""
    mask: Tensor | None
    """(height, width) in the mask's floor..1."""
    original_size: tuple[int, int]
    """Width and height of the picture."""
    crop: tuple[int, int]
    """Top and left of the cut in the picture as it was scaled."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How a picture is scaled, where it is cut, and what else becomes of it."""

    scaled: tuple[int, int]
    top: int
    left: int
    mirrored: bool
    colors: tuple[float, ...]
    """Factors of brightness, contrast and saturation."""


def make_view(example: Example, bucket: Bucket, config: DataConfig, *, seed: int, variant: int) -> View:
    """The same arguments give the same bits. Raises DatasetError for a picture or mask that cannot be read."""
    picture = read_picture(example.picture)
    cut = draw_crop(picture.size, bucket, config, seed=seed, variant=variant)
    shown = apply_crop(picture, bucket, cut, Image.Resampling.LANCZOS)
    for enhancer, factor in zip(ENHANCERS, cut.colors, strict=False):
        shown = enhancer(shown).enhance(factor)
    pixels = torch.from_numpy(np.array(shown, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    return View(
        pixels=pixels,
        mask=make_mask(example, bucket, cut, config),
        original_size=picture.size,
        crop=(cut.top, cut.left),
    )


def make_view_key(example: Example, bucket: Bucket, config: DataConfig, *, seed: int, variant: int) -> str:
    """All that decides a view: hashes of picture and mask, and what is done to them. Decodes nothing."""
    cut = draw_crop(read_size(example.picture), bucket, config, seed=seed, variant=variant)
    mask = (config.masks, config.mask_floor, file_hash(example.mask)) if example.mask else None
    return repr((file_hash(example.picture), mask, bucket, cut))


def draw_crop(size: tuple[int, int], bucket: Bucket, config: DataConfig, *, seed: int, variant: int) -> Crop:
    """Scaled so that it covers the bucket; every draw is made, used or not, so that settings do not mix."""
    rng = Generator().manual_seed(seed + variant)
    zoom, down, right, *shifts = torch.rand(6, generator=rng, dtype=torch.float64).tolist()
    random = config.crop == "random"
    scale = max(bucket.width / size[0], bucket.height / size[1])
    scale *= 1 + zoom * (config.crop_zoom - 1) if random else 1
    scaled = max(bucket.width, math.ceil(size[0] * scale - 1e-6)), max(bucket.height, math.ceil(size[1] * scale - 1e-6))
    room = scaled[1] - bucket.height, scaled[0] - bucket.width
    top, left = (int(down * (room[0] + 1)), int(right * (room[1] + 1))) if random else (room[0] // 2, room[1] // 2)
    jitter = config.color_jitter
    colors = tuple(1 + jitter * (2 * shift - 1) for shift in shifts) if jitter else ()
    return Crop(scaled=scaled, top=top, left=left, mirrored=config.flip and variant % 2 == 1, colors=colors)


def apply_crop(picture: Image.Image, bucket: Bucket, cut: Crop, how: Image.Resampling) -> Image.Image:
    box = (cut.left, cut.top, cut.left + bucket.width, cut.top + bucket.height)
    shown = picture.resize(cut.scaled, how).crop(box)
    return ImageOps.mirror(shown) if cut.mirrored else shown


def make_mask(example: Example, bucket: Bucket, cut: Crop, config: DataConfig) -> Tensor | None:
    if example.mask is None:
        return None
    mask = read_alpha(example.mask) if config.masks == "alpha" else read_mask(example.mask)
    shown = apply_crop(mask, bucket, cut, Image.Resampling.BOX)
    counted = torch.from_numpy(np.array(shown, dtype=np.float32)) / 255
    return config.mask_floor + (1 - config.mask_floor) * counted
