"""Requests to generate images, made from settings, a preset, or the metadata of an image."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendEntry, Composition
from lora_diffusion.config.settings import EMBEDDED_BASE, Model, Quantization, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.presets import read_preset
from lora_diffusion.library.recipe import Recipe, has_recipe, read_recipe
from lora_diffusion.library.references import AdapterResolver, resolve_entry_paths, resolve_hashes, resolve_tags
from lora_diffusion.prompts.image_metadata import read_infotext
from lora_diffusion.prompts.infotext import Infotext, convert_settings
from lora_diffusion.prompts.tags import convert_a1111_tags, extract_tags

_AND = re.compile(r"\bAND\b")
"""The operator that composes several prompts in A1111."""
_EMPHASIS = re.compile(r"(?<!\\)[(\[]")
"""The start of emphasis in a prompt of A1111."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Images to generate, with adapters by reference."""

    base: str
    """`tiny-sd`, a diffusers folder or a hub id."""
    entries: tuple[BlendEntry, ...]
    """Adapters by path or hash, with weights."""
    settings: GenerateConfig
    """Prompt and sampling settings."""
    composition: Composition = field(default_factory=Composition)
    """How the adapters are combined."""
    quantization: Quantization = "none"
    """Type in which the weights of the base's linear layers are stored."""
    recipe: Recipe | None = None
    """Recipe of the image that is reproduced."""
    notes: tuple[str, ...] = ()
    """Known reasons why a reproduced image may differ from the original."""


def request_from_preset(
    path: str | os.PathLike[str],
    *,
    base: str,
    settings: Mapping[str, Any],
    composition: Mapping[str, Any],
    adapters: tuple[BlendEntry, ...],
) -> GenerationRequest:
    """Make a request from a preset.

    Args:
        path: The preset file.
        base: Base to use instead of the preset's; empty for the preset's.
        settings: Sampling settings that replace those of the preset.
        composition: Settings of the composition that replace those of the preset.
        adapters: Adapters in addition to those of the preset.

    Raises:
        ConfigError: If the preset cannot be read, or a setting is invalid.
    """
    path = Path(path)
    preset = read_preset(path)
    return GenerationRequest(
        base=base or preset.base,
        entries=resolve_entry_paths(preset.adapters, path.parent) + adapters,
        settings=_merge_settings(GenerateConfig, preset.settings, settings, source=str(path)),
        composition=_merge_settings(Composition, preset.composition, composition, source=str(path)),
    )


def _merge_settings(
    settings_class: type[Model], existing: Model | None, changes: Mapping[str, Any], *, source: str
) -> Model:
    """Replace some settings of an existing object, or of the defaults, and validate the result."""
    return validate(settings_class, {**(existing.model_dump() if existing else {}), **changes}, source=source)


def request_from_image(image: str | os.PathLike[str], *, base: str, resolver: AdapterResolver) -> GenerationRequest:
    """Make a request that reproduces an image from its metadata.

    Args:
        image: A PNG of this package, which has a recipe, or an image of A1111 or Forge, which has an infotext.
        base: Base to use instead of the recipe's; needed for images of other programs.
        resolver: Finds the adapters of an infotext by hash or name.

    Raises:
        ConfigError: If the image cannot be read, or has neither a recipe nor an infotext.
    """
    image = Path(image)
    info = None if has_recipe(image) else read_infotext(image)
    if info is not None:
        return _request_from_infotext(image, info, base=base, resolver=resolver)
    recipe = read_recipe(image)
    return GenerationRequest(
        base=base or recipe.base,
        entries=recipe.adapters,
        settings=recipe.settings,
        composition=recipe.composition,
        quantization=recipe.quantization,
        recipe=recipe,
    )


def request_from_settings(
    image: str | os.PathLike[str] | None,
    *,
    base: str,
    settings: Mapping[str, Any],
    composition: Mapping[str, Any],
    adapters: tuple[BlendEntry, ...],
    resolver: AdapterResolver,
) -> GenerationRequest:
    """Make a request from settings, or from the metadata of an image with some settings replaced.

    Args:
        image: Image whose metadata is used; None to start from the embedded base and the default settings.
        base: Base to use instead of the image's; empty for the image's.
        settings: Sampling settings that replace those of the image.
        composition: Settings of the composition that replace those of the image.
        adapters: Adapters in addition to those of the image.
        resolver: Finds the adapters of an infotext by hash or name.

    Raises:
        ConfigError: If the image has no usable metadata, or a setting is invalid.
    """
    defaults = GenerationRequest(base=EMBEDDED_BASE, entries=(), settings=GenerateConfig(prompt=""))
    start = request_from_image(image, base=base, resolver=resolver) if image else defaults
    return GenerationRequest(
        base=base or start.base,
        entries=start.entries + adapters,
        settings=_merge_settings(GenerateConfig, start.settings, settings, source="preset save"),
        composition=_merge_settings(Composition, start.composition, composition, source="preset save"),
        notes=start.notes,
    )


def _request_from_infotext(image: Path, info: Infotext, *, base: str, resolver: AdapterResolver) -> GenerationRequest:
    """Make a request from the infotext of A1111 or Forge, as far as its settings have a counterpart here."""
    if not base:
        model = f" ({info.model})" if info.model else ""
        raise ConfigError(
            f"{image}: was made by another program, and its base{model} is not known here; give the base with --base"
        )
    table, notes = convert_settings(info, source=str(image))
    prompt, tags = extract_tags(convert_a1111_tags(str(table.get("prompt", ""))))
    entries, hash_notes = resolve_hashes(tags, info, resolver)
    settings = validate(GenerateConfig, {**table, "prompt": prompt}, source=str(image))
    return GenerationRequest(
        base=base,
        entries=entries,
        settings=settings,
        notes=(*notes, *hash_notes, *_unsupported_prompt_features(info, settings)),
    )


def _unsupported_prompt_features(info: Infotext, settings: GenerateConfig) -> list[str]:
    """Describe the parts of the prompt that A1111 interprets in another way."""
    notes: list[str] = []
    if info.ti_hashes:
        tokens = ", ".join(info.ti_hashes)
        notes.append(
            f"its textual inversion embeddings ({tokens}) are not searched for; give their files with --adapter"
        )
    prompts = f"{settings.prompt}\n{settings.negative_prompt}"
    if _EMPHASIS.search(prompts):
        notes.append(
            "emphasis differs: words in brackets are interpolated with the empty prompt here, while A1111 rescales all "
            "words"
        )
    if _AND.search(prompts):
        notes.append("AND is an ordinary word here, while A1111 composes prompts with it")
    return notes


def resolve_prompt_tags(request: GenerationRequest, resolver: AdapterResolver) -> GenerationRequest:
    """Move the `<lora:...>` tags of the prompt into the adapters of the request.

    Raises:
        ConfigError: If a tag names an unknown adapter, or the negative prompt contains a tag.
    """
    if extract_tags(request.settings.negative_prompt)[1]:
        raise ConfigError(
            f"the negative prompt contains a tag: {request.settings.negative_prompt!r}; move it to the prompt"
        )
    prompt, tags = extract_tags(request.settings.prompt)
    if not tags:
        return request
    settings = request.settings.model_copy(update={"prompt": prompt})
    return replace(request, settings=settings, entries=(*request.entries, *resolve_tags(tags, resolver)))
