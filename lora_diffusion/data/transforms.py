"""Crop, flip and color-jitter training images, together with their masks."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Generator, Tensor

from lora_diffusion.config.train import DataConfig
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.folder import Example
from lora_diffusion.data.images import read_alpha, read_mask, read_picture, read_size

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, kw_only=True)
class View:
    """One crop of a training image, with its mask and SDXL's size conditioning."""

    pixels: Tensor = field(repr=False)
    """Pixels (3, height, width), float32 in [-1, 1]."""
    mask: Tensor | None = field(repr=False)
    """Loss weights (height, width) in [mask_floor, 1]."""
    original_size: tuple[int, int]
    """Width and height of the image before scaling."""
    crop: tuple[int, int]
    """Top and left of the crop in the scaled image."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The random choices of one view."""

    scaled: tuple[int, int]
    """Width and height that the image is scaled to."""
    top: int
    """Top edge of the crop in the scaled image."""
    left: int
    """Left edge of the crop in the scaled image."""
    mirrored: bool
    """Whether the crop is flipped horizontally."""
    colors: tuple[float, ...]
    """Factors for brightness, contrast and saturation; empty for none."""


def make_view(example: Example, bucket: Bucket, config: DataConfig, *, seed: int, variant: int) -> View:
    """Read an image and crop it to its bucket; the same arguments always give the same view.

    Args:
        example: The image and its mask.
        bucket: The size to crop to.
        config: The data settings: cropping, flipping and color jitter.
        seed: The random seed.
        variant: The number of the view; odd ones are mirrored if `config.flip`.

    Raises:
        DatasetError: If the image or the mask cannot be read.
    """
    picture = read_picture(example.picture)
    crop = _draw_crop(picture.size, bucket, config, seed=seed, variant=variant)
    cropped = _apply_crop(picture, bucket, crop, Image.Resampling.LANCZOS)
    for enhancer, factor in zip(_ENHANCERS, crop.colors, strict=False):
        cropped = enhancer(cropped).enhance(factor)
    pixels = torch.as_tensor(np.array(cropped, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    return View(
        pixels=pixels,
        mask=_make_mask(example, bucket, crop, config),
        original_size=picture.size,
        crop=(crop.top, crop.left),
    )


def make_view_key(example: Example, bucket: Bucket, config: DataConfig, *, seed: int, variant: int) -> str:
    """Return a cache key that identifies a view, without decoding the image.

    The key contains the hashes of the image and the mask, and everything that is done to them, as the repr of `Crop`.
    The arguments are those of `make_view`.
    """
    crop = _draw_crop(read_size(example.picture), bucket, config, seed=seed, variant=variant)
    mask = (config.masks, config.mask_floor, file_hash(example.mask)) if example.mask else None
    return repr((file_hash(example.picture), mask, bucket, crop))


def _draw_crop(size: tuple[int, int], bucket: Bucket, config: DataConfig, *, seed: int, variant: int) -> Crop:
    """Choose scale, position, mirroring and colors, for an image of a size (width, height) that must cover a bucket.

    All random numbers are always drawn, so that changing one setting does not change the others' random choices.
    """
    rng = Generator().manual_seed(seed + variant)  # not `derive_seed`: the crops are part of recorded runs
    zoom, down, right, *shifts = map(float, torch.rand(6, generator=rng, dtype=torch.float64))
    random = config.crop == "random"
    scale = max(bucket.width / size[0], bucket.height / size[1])
    scale *= 1 + zoom * (config.crop_zoom - 1) if random else 1
    scaled = max(bucket.width, math.ceil(size[0] * scale - 1e-6)), max(bucket.height, math.ceil(size[1] * scale - 1e-6))
    max_top, max_left = scaled[1] - bucket.height, scaled[0] - bucket.width
    top, left = (int(down * (max_top + 1)), int(right * (max_left + 1))) if random else (max_top // 2, max_left // 2)
    jitter = config.color_jitter
    colors = tuple(1 + jitter * (2 * shift - 1) for shift in shifts) if jitter else ()
    return Crop(scaled=scaled, top=top, left=left, mirrored=config.flip and variant % 2 == 1, colors=colors)


def _apply_crop(picture: Image.Image, bucket: Bucket, crop: Crop, resampling: Image.Resampling) -> Image.Image:
    """Scale, crop and mirror an image or a mask."""
    box = (crop.left, crop.top, crop.left + bucket.width, crop.top + bucket.height)
    cropped = picture.resize(crop.scaled, resampling).crop(box)
    return ImageOps.mirror(cropped) if crop.mirrored else cropped


def _make_mask(example: Example, bucket: Bucket, crop: Crop, config: DataConfig) -> Tensor | None:
    """Read and crop a mask to loss weights (height, width) in [mask_floor, 1]."""
    if example.mask is None:
        return None
    mask = read_alpha(example.mask) if config.masks == "alpha" else read_mask(example.mask)
    cropped = _apply_crop(mask, bucket, crop, Image.Resampling.BOX)
    weights = torch.as_tensor(np.array(cropped, dtype=np.float32)) / 255
    return config.mask_floor + (1 - config.mask_floor) * weights
