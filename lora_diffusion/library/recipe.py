"""The recipe that made an output, keyed by content hashes, and PNG files that carry it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import ValidationError

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
INFOTEXT_KEY = "parameters"


class Recipe(Settings):
    """Everything needed to make an image or a merged checkpoint again."""

    kind: Literal["image", "merge"]
    base: str
    base_hash: str
    adapters: tuple[BlendEntry, ...] = ()
    composition: Composition = Composition()
    settings: GenerateConfig | None = None
    precision: str = "float32"
    quantization: Quantization = "none"
    device: str = "cpu"
    versions: Mapping[str, str] = {}


def library_versions() -> dict[str, str]:
    """Versions of what decides the pixels."""
    return {name: version(name) for name in ("lora-diffusion", "torch", "diffusers", "transformers")}


def blend_entries(blend: Blend) -> tuple[BlendEntry, ...]:
    """The blend by reference: where each adapter was found, its hash and weight."""
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
    """What may change the pixels of a replay: another device or other versions than the recipe's."""
    found = [] if recipe.device == device else [f"made on {recipe.device}, replayed on {device}"]
    for name, own in library_versions().items():
        if recipe.versions.get(name, own) != own:
            found.append(f"made with {name} {recipe.versions[name]}, replayed with {own}")
    return found


def format_infotext(recipe: Recipe) -> str:
    """The recipe as other programs show it (the A1111 convention under the PNG key `parameters`)."""
    settings = recipe.settings
    if settings is None:
        return ""
    tags = "".join(f" <lora:{e.name or Path(e.path).stem}:{format_weight(e.weight)}>" for e in recipe.adapters)
    pairs = {
        "Steps": str(settings.steps),
        "Sampler": settings.scheduler,
        "CFG scale": f"{settings.guidance:g}",
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


def write_png(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write the image with its recipe, whole or not at all. Raises OutputError."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text(PNG_KEY, recipe.model_dump_json())
    texts.add_text(INFOTEXT_KEY, format_infotext(recipe))
    with atomic_file(path) as part:
        image.save(part, format="PNG", pnginfo=texts)


def has_recipe(path: Path) -> bool:
    """Whether a file is a PNG with a recipe of ours in it, readable or not."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return PNG_KEY in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def read_recipe(path: Path) -> Recipe:
    """The recipe inside a PNG that `generate` wrote. Raises ConfigError if there is none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(PNG_KEY)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a PNG that `lora-diffusion generate` wrote") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: not a readable PNG ({error}); give one that `generate` wrote") from None
    if not isinstance(text, str):
        raise ConfigError(f"{path}: carries no recipe; give a PNG that `lora-diffusion generate` wrote")
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: its recipe cannot be used: {format_validation_error(error, Recipe)}") from None
