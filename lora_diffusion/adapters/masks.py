"""Rasterize the region of an image that an adapter acts in: boxes and mask images with soft edges."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, UnidentifiedImageError
from torch import Tensor

from lora_diffusion.config.preset import Region
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.errors import ConfigError

SIDE = 512
"""Side in pixels of the square on which masks are drawn before they are scaled down for each layer."""


def region_mask(region: Region) -> Tensor:
    """Rasterize a region.

    Returns:
        Mask of 0 to 1, (SIDE, SIDE) in float32, stretched to a square whatever the shape of the image.

    Raises:
        ConfigError: If a mask file cannot be read or has changed, or the region is empty.
    """
    image = _draw_box(region.box) if region.box else _load_mask_image(region)
    softened = image.filter(ImageFilter.GaussianBlur(region.feather * SIDE / 4)) if region.feather else image
    untyped: Any = torch  # PyTorch's stub does not type the argument of from_numpy
    mask: Tensor = untyped.from_numpy(np.asarray(softened, dtype=np.float32) / 255)
    if not bool(mask.any()):
        raise ConfigError(f"the region {region.mask or region.box} is empty; expected a box or mask that covers pixels")
    return mask


def _draw_box(box: tuple[float, float, float, float]) -> Image.Image:
    left, top, right, bottom = (round(side * SIDE) for side in box)
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(255, (left, top, right, bottom))
    return image


def _load_mask_image(region: Region) -> Image.Image:
    """Read the brightness of a mask image, stretched to the square."""
    path = Path(region.mask)
    if region.mask_hash and mask_hash(path) != region.mask_hash:
        raise ConfigError(f"{path}: is not the mask that the recipe was made with; restore the original file")
    try:
        with Image.open(path) as image:
            return _to_gray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a mask ({error}); expected an image that is white where the adapter acts"
        ) from None


def _to_gray(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit brightness. Transparent pixels become black; 16-bit images are scaled down."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), layered).convert("L")


def with_mask_hash(region: Region) -> Region:
    """Return the region with the hash of its mask file filled in, if it has a mask and no hash yet.

    Raises:
        ConfigError: If the mask file cannot be read.
    """
    if not region.mask or region.mask_hash:
        return region
    return region.model_copy(update={"mask_hash": mask_hash(Path(region.mask))})


def mask_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a mask file.

    Raises:
        ConfigError: If the file cannot be read.
    """
    try:
        return file_hash(path, use_cache=False)
    except OSError as error:
        raise ConfigError(
            f"{os.fspath(path)}: cannot be read as a mask ({error.strerror}); expected an image file"
        ) from None


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Scale a mask down to the resolution of a layer, (height, width), by averaging areas."""
    return torch.nn.functional.adaptive_avg_pool2d(mask[None, None], (height, width))[0, 0]


def infer_token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Infer the spatial resolution of an attention layer from its number of tokens.

    Each downsampling of the UNet halves height and width, rounded up.

    Args:
        tokens: Number of tokens of the layer.
        height: Height of the latents.
        width: Width of the latents.

    Returns:
        Rows and columns of the token grid.

    Raises:
        ConfigError: If no downsampled resolution has that number of tokens.
    """
    rows, columns = height, width
    while rows * columns > tokens and (rows > 1 or columns > 1):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != tokens:
        raise ConfigError(
            f"a layer of {tokens} tokens matches no resolution of latents {height} x {width}; choose another image size"
        )
    return rows, columns
