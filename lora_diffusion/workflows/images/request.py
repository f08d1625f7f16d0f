"""What pictures to make: from flags, a preset, a picture's own recipe, or a picture of another program."""

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

_COMPOSABLE = re.compile(r"\bAND\b")
"""What joins several prompts to A1111."""
_EMPHASIS = re.compile(r"(?<!\\)[(\[]")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Images to generate: base, adapters by reference, settings, and for a replay the recipe to follow."""

    base: str
    entries: tuple[BlendEntry, ...]
    settings: GenerateConfig
    composition: Composition = field(default_factory=Composition)
    quantization: Quantization = "none"
    """What the base's linear layers are kept in."""
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()
    """What is known already to make a replay differ."""


def request_from_preset(
    path: Path,
    *,
    base: str,
    settings: Mapping[str, Any],
    composition: Mapping[str, Any],
    adapters: tuple[BlendEntry, ...],
) -> GenerationRequest:
    """Make a request from a preset; settings given besides take precedence. Raises ConfigError."""
    preset = read_preset(path)
    return GenerationRequest(
        base=base or preset.base,
        entries=resolve_entry_paths(preset.adapters, path.parent) + adapters,
        settings=_merge_settings(GenerateConfig, preset.settings, settings, source=str(path)),
        composition=_merge_settings(Composition, preset.composition, composition, source=str(path)),
    )


def _merge_settings(kind: type[Model], kept: Model | None, given: Mapping[str, Any], *, source: str) -> Model:
    """Merge given settings into existing ones. Raises ConfigError."""
    return validate(kind, {**(kept.model_dump() if kept else {}), **given}, source=source)


def request_from_image(image: Path, *, base: str, resolver: AdapterResolver) -> GenerationRequest:
    """Make a request that reproduces a picture: ours from its recipe, A1111's and Forge's from their infotext.

    Raises ConfigError if it carries neither.
    """
    info = None if has_recipe(image) else read_infotext(image)
    if info is not None:
        return _request_from_infotext(image, info, base=base, resolver=resolver)
    recipe = read_recipe(image)
    if recipe.kind != "image" or recipe.settings is None:
        raise ConfigError(f"{image}: carries the recipe of a {recipe.kind}, not of a picture")
    return GenerationRequest(
        base=base or recipe.base,
        entries=recipe.adapters,
        settings=recipe.settings,
        composition=recipe.composition,
        quantization=recipe.quantization,
        recipe=recipe,
    )


def request_from_settings(
    image: Path | None,
    *,
    base: str,
    settings: Mapping[str, Any],
    composition: Mapping[str, Any],
    adapters: tuple[BlendEntry, ...],
    resolver: AdapterResolver,
) -> GenerationRequest:
    """Make a request from settings, merged into a picture's own recipe if given. Raises ConfigError."""
    nothing = GenerationRequest(base=EMBEDDED_BASE, entries=(), settings=GenerateConfig(prompt=""))
    start = request_from_image(image, base=base, resolver=resolver) if image else nothing
    return GenerationRequest(
        base=base or start.base,
        entries=start.entries + adapters,
        settings=_merge_settings(GenerateConfig, start.settings, settings, source="preset save"),
        composition=_merge_settings(Composition, start.composition, composition, source="preset save"),
        notes=start.notes,
    )


def _request_from_infotext(image: Path, info: Infotext, *, base: str, resolver: AdapterResolver) -> GenerationRequest:
    """Make a request from an A1111 or Forge picture, as far as its settings have a counterpart here.

    Raises ConfigError if no base is given, as a picture names one that only its maker has.
    """
    if not base:
        named = f" ({info.model})" if info.model else ""
        raise ConfigError(f"{image}: was made by another program on a base of its own{named}; give that with --base")
    table, notes = convert_settings(info, source=str(image))
    prompt, tags = extract_tags(convert_a1111_tags(str(table.get("prompt", ""))))
    entries, more = resolve_hashes(tags, info, resolver)
    settings = validate(GenerateConfig, {**table, "prompt": prompt}, source=str(image))
    return GenerationRequest(
        base=base,
        entries=entries,
        settings=settings,
        notes=(*notes, *more, *_unsupported_prompt_features(info, settings)),
    )


def _unsupported_prompt_features(info: Infotext, settings: GenerateConfig) -> list[str]:
    """Describe what the other program would interpret in the prompt and this one does not."""
    notes: list[str] = []
    if info.ti_hashes:
        words = ", ".join(info.ti_hashes)
        notes.append(f"its learned tokens ({words}) are not looked for; give their files with --adapter")
    prompts = f"{settings.prompt}\n{settings.negative_prompt}"
    if _EMPHASIS.search(prompts):
        notes.append("words in brackets are moved away from the empty prompt here, where A1111 rescales all words")
    if _COMPOSABLE.search(prompts):
        notes.append("AND is read as a plain word here")
    return notes


def resolve_prompt_tags(request: GenerationRequest, resolver: AdapterResolver) -> GenerationRequest:
    """Turn the tags in the prompt into adapters. Raises ConfigError for an unknown name."""
    if extract_tags(request.settings.negative_prompt)[1]:
        raise ConfigError(
            f"the negative prompt has a tag in it: {request.settings.negative_prompt!r}; tags go into the prompt"
        )
    prompt, tags = extract_tags(request.settings.prompt)
    if not tags:
        return request
    settings = request.settings.model_copy(update={"prompt": prompt})
    return replace(request, settings=settings, entries=(*request.entries, *resolve_tags(tags, resolver)))
