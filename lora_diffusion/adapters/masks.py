"""Where in a picture an adapter acts: boxes and drawn masks, softened at their edges, at any resolution."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, UnidentifiedImageError
from torch import Tensor

from lora_diffusion.config.preset import Region
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.errors import ConfigError

SIDE = 512
"""Masks are drawn on a square of this size and scaled down for each layer."""


def region_mask(region: Region) -> Tensor:
    """The region as a (SIDE, SIDE) float32 mask of 0 to 1, whatever the picture's shape.

    Raises ConfigError for a mask file that cannot be read or has changed, or a region that is empty.
    """
    image = draw_box(region.box) if region.box else load_mask_image(region)
    softened = image.filter(ImageFilter.GaussianBlur(region.feather * SIDE / 4)) if region.feather else image
    mask = torch.from_numpy(np.asarray(softened, dtype=np.float32) / 255)
    if not bool(mask.any()):
        raise ConfigError(f"the region {region.mask or region.box} is empty; an adapter would act nowhere")
    return mask


def draw_box(box: tuple[float, float, float, float]) -> Image.Image:
    left, top, right, bottom = (round(side * SIDE) for side in box)
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(255, (left, top, right, bottom))
    return image


def load_mask_image(region: Region) -> Image.Image:
    """The mask's brightness, stretched to the square."""
    path = Path(region.mask)
    if region.mask_hash and mask_hash(path) != region.mask_hash:
        raise ConfigError(f"{path}: is not the mask that the recipe was made with; give back the original file")
    try:
        with Image.open(path) as image:
            return to_gray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: cannot be read as a mask ({error}); give a picture, white where it acts") from None


def to_gray(image: Image.Image) -> Image.Image:
    """Brightness in 8 bits; what is transparent counts as black, 16 bits are scaled down."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), layered).convert("L")


def with_mask_hash(region: Region) -> Region:
    """A region whose mask is known by its hash. Raises ConfigError if the mask cannot be read."""
    if not region.mask or region.mask_hash:
        return region
    return region.model_copy(update={"mask_hash": mask_hash(Path(region.mask))})


def mask_hash(path: Path) -> str:
    """SHA-256 of a mask file. Raises ConfigError if it cannot be read."""
    try:
        return file_hash(path, use_cache=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a mask ({error.strerror}); give a picture") from None


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask at a layer's resolution, (height, width): the mean of what falls into each place."""
    return torch.nn.functional.adaptive_avg_pool2d(mask[None, None], (height, width))[0, 0]


def infer_token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """The height and width of a layer with that many tokens, for latents of a given size.

    Each step down halves both, rounded up. Raises ConfigError if no such step gives the number.
    """
    rows, columns = height, width
    while rows * columns > tokens and (rows > 1 or columns > 1):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != tokens:
        raise ConfigError(
            f"a layer of {tokens} tokens fits no scale of latents {height} x {width}; choose another size"
        )
    return rows, columns
