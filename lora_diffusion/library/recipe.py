"""Recipes, which record how an image was made, and PNG files that carry them.

A recipe identifies the base and the adapters by content hash. It is stored as JSON in the PNG text chunk
`lora_diffusion`; the chunk `parameters` repeats it as an A1111 infotext for other programs.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import AliasChoices, Field, ValidationError

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.masks import with_mask_hash
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendEntry, Composition
from lora_diffusion.config.settings import Quantization, Settings, format_validation_error
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.errors import ConfigError
from lora_diffusion.prompts.infotext import quote_value
from lora_diffusion.prompts.tags import format_weight

PNG_KEY = "lora_diffusion"
"""Key of the PNG text chunk with the recipe."""
INFOTEXT_KEY = "parameters"
"""Key of the PNG text chunk in which A1111 stores its generation parameters."""


class Recipe(Settings):
    """Everything needed to reproduce an image."""

    kind: Literal["image"] = "image"
    """Marks the JSON as the recipe of an image."""
    base: str
    """Name, path or hub id of the base."""
    base_hash: str
    """SHA-256 over the base's weight files; see `Base.hash`."""
    adapters: tuple[BlendEntry, ...] = ()
    """The adapters with their weights and hashes."""
    composition: Composition = Composition()
    """How the adapters are combined."""
    settings: GenerateConfig
    """The sampling settings."""
    precision: str = "float32"
    """Data type of the weights, as torch names it."""
    quantization: Annotated[Quantization, Field(validation_alias=AliasChoices("quantization", "codes"))] = "none"
    """Quantized data type of the UNet's linear layers."""
    device: str = "cpu"
    """Type of the device, such as `cpu` or `cuda`."""
    versions: Mapping[str, str] = {}
    """Versions of the packages in `library_versions`."""


def library_versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect the result of sampling."""
    return {name: version(name) for name in ("lora-diffusion", "torch", "diffusers", "transformers")}


def blend_entries(blend: Blend) -> tuple[BlendEntry, ...]:
    """Describe the adapters of a blend by path, name, hash, weight and region, as a recipe stores them."""
    return tuple(
        BlendEntry(
            path=str(e.path or e.name),
            weight=e.weight,
            name=e.name,
            hash=e.hash,
            payload_hash=e.payload_hash,
            region=e.region and with_mask_hash(e.region),
        )
        for e in blend.entries
    )


def list_differences(recipe: Recipe, *, device: str) -> list[str]:
    """List what may make a replay of a recipe differ from the original: another device or other package versions.

    Args:
        recipe: The recipe to replay.
        device: The type of the device that it is replayed on.
    """
    found = [] if recipe.device == device else [f"made on {recipe.device}, replayed on {device}"]
    for name, own in library_versions().items():
        if recipe.versions.get(name, own) != own:
            found.append(f"made with {name} {recipe.versions[name]}, replayed with {own}")
    return found


def format_infotext(recipe: Recipe) -> str:
    """Format a recipe as an A1111 infotext."""
    settings = recipe.settings
    tags = "".join(f" <lora:{e.name or Path(e.path).stem}:{format_weight(e.weight)}>" for e in recipe.adapters)
    pairs = {
        "Steps": str(settings.num_inference_steps),
        "Sampler": settings.scheduler,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": str(settings.seed),
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": recipe.base_hash[:10],
        "Model": recipe.base,
    }
    if settings.variation:
        pairs |= {
            "Variation seed": str(settings.variation_seed),
            "Variation seed strength": f"{settings.variation:g}",
        }
    hashes = ", ".join(f"{e.name or Path(e.path).stem}: {(e.payload_hash or e.hash)[:12]}" for e in recipe.adapters)
    if hashes:
        pairs["Lora hashes"] = hashes
    negative = [f"Negative prompt: {settings.negative_prompt}"] if settings.negative_prompt else []
    return "\n".join([settings.prompt + tags, *negative, ", ".join(f"{k}: {quote_value(v)}" for k, v in pairs.items())])


def write_png(image: Image.Image, path: str | os.PathLike[str], recipe: Recipe) -> None:
    """Write an image as a PNG file with its recipe, atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    texts = PngImagePlugin.PngInfo()
    texts.add_text(PNG_KEY, recipe.model_dump_json())
    texts.add_text(INFOTEXT_KEY, format_infotext(recipe))
    with atomic_file(Path(path)) as part:
        image.save(part, format="PNG", pnginfo=texts)


def has_recipe(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a PNG with a recipe of this package; the recipe itself is not validated."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return PNG_KEY in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read the recipe from a PNG that `lora-diffusion generate` wrote.

    Raises:
        ConfigError: If the file is missing, is not a PNG, or has no valid recipe.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(PNG_KEY)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a PNG that `lora-diffusion generate` wrote") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{path}: not a readable PNG ({error}); give one that `lora-diffusion generate` wrote"
        ) from None
    if not isinstance(text, str):
        raise ConfigError(f"{path}: carries no recipe; give a PNG that `lora-diffusion generate` wrote")
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: its recipe is not valid: {format_validation_error(error, Recipe)}") from None
