"""The one way to make an image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_diffusion.blend import Blend, WeightedAdapter
from lora_diffusion.config import BlendEntry, GenerateConfig, Scheduler
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.native import load_adapter
from lora_diffusion.models import Base, new_scheduler, quiet_libraries
from lora_diffusion.patching import blended
from lora_diffusion.recipe import Recipe, blend_entries, library_versions


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and the recipe that makes it again."""

    image: Image.Image
    recipe: Recipe


def single_settings(base: Base, config: GenerateConfig) -> Iterator[GenerateConfig]:
    """The settings of each picture alone: its own seed, the size spelled out."""
    size = {"width": config.width or base.size_px, "height": config.height or base.size_px}
    for i in range(config.count):
        yield config.model_copy(update={**size, "seed": config.seed + i, "count": 1})


def sample(base: Base, settings: GenerateConfig) -> Image.Image:
    """One picture from the base as it stands. Noise comes from the CPU, so that devices agree on it."""
    result = pipeline_with(base, settings.scheduler)(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt or None,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        width=settings.width,
        height=settings.height,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
    )
    return result.images[0]


def pipeline_with(base: Base, scheduler: Scheduler) -> Any:
    """The base's models in a pipeline with a scheduler of its own, so that no state is shared between two runs."""
    components = {**base.pipe.components, "scheduler": new_scheduler(base, scheduler)}
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    with quiet_libraries():
        pipe = type(base.pipe)(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    base: Base, configs: Sequence[GenerateConfig], blend: Blend | None = None, *, files: Sequence[Path] = ()
) -> Iterator[Picture]:
    """Pictures of all settings under one blend, each with its recipe; one after another, so that none depends on its
    neighbours. `files` are where the blend's adapters were found, for the recipe.

    Raises FamilyMismatchError if an adapter does not belong to the base.
    """
    blend = blend or Blend()
    found = tuple(files) or tuple(Path(e.adapter.metadata.name) for e in blend.entries)
    entries = blend_entries(blend, found)
    with blended(base, blend):
        for config in configs:
            for settings in single_settings(base, config):
                recipe = Recipe(
                    kind="image",
                    base=base.name,
                    base_hash=base.hash,
                    adapters=entries,
                    settings=settings,
                    precision=str(base.pipe.unet.dtype).removeprefix("torch."),
                    device=base.pipe.device.type,
                    versions=library_versions(),
                )
                yield Picture(image=sample(base, settings), recipe=recipe)


def load_blend(entries: Iterable[BlendEntry], *, folder: Path | None = None) -> tuple[Blend, tuple[Path, ...]]:
    """The adapters that a preset or recipe refers to, checked against their hashes, and their paths.

    Raises AdapterFormatError for a file that is no adapter, ConfigError for one whose content has changed.
    """
    weighted: list[WeightedAdapter] = []
    paths: list[Path] = []
    for entry in entries:
        path = (folder or Path()) / entry.path
        item = WeightedAdapter(adapter=load_adapter(path), weight=entry.weight)
        if entry.hash and item.hash != entry.hash:
            raise ConfigError(
                f"{path}: its content (hash {item.hash[:12]}) is not what the recipe was made with "
                f"({entry.hash[:12]}); give back the original file"
            )
        weighted.append(item)
        paths.append(path)
    return Blend(entries=tuple(weighted)), tuple(paths)


def check_base_hash(base: Base, recipe: Recipe) -> None:
    """Raise ConfigError if the base is not the one that the recipe was made with."""
    if base.hash != recipe.base_hash:
        raise ConfigError(
            f"{base.name}: its weights (hash {base.hash[:12]}) are not those of the recipe ({recipe.base_hash[:12]}); "
            "give the original base with --base"
        )
