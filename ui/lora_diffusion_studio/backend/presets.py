"""Presets in the studio: lists the packaged and the user's presets; saves, renames, imports and deletes the user's.

A user's preset is a JSON file in the folder `presets` of the output folder, with a PNG thumbnail of the same name.
"""

import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diffusion.config.generate import LoadConfig
from lora_diffusion.config.preset import BlendPreset
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.presets import list_presets, read_preset
from lora_diffusion.prompts.tags import format_weight
from lora_diffusion.workflows.images.generate import save_request_as_preset
from lora_diffusion_studio.backend.config import check_file_name, packaged_presets_folder
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.blend_form import BlendForm


@dataclass(frozen=True, kw_only=True)
class PresetFile:
    """A preset file as the studio lists it."""

    name: str
    """Name in the list: the file name without suffix, followed by `(built-in)` for a packaged preset."""
    path: Path
    title: str
    """Name that is stored in the preset."""
    summary: str
    """Description and adapters with their weights."""
    thumbnail: Path | None
    built_in: bool
    """Whether the preset comes with the package and cannot be changed."""
    problem: str = ""
    """Why the file cannot be read; empty if it can."""


def list_saved_presets(studio: Studio) -> list[PresetFile]:
    """Return the user's presets, then the packaged ones, including files that cannot be read."""
    folders = ((studio.config.presets, False), (packaged_presets_folder(), True))
    return [
        _describe_preset(path, preset, built_in=built_in)
        for folder, built_in in folders
        for path, preset in list_presets(folder)
    ]


def _describe_preset(path: Path, preset: BlendPreset | str, *, built_in: bool) -> PresetFile:
    """Return the list entry of a file; `preset` is its content, or the message why it cannot be read."""
    name = f"{path.stem} (built-in)" if built_in else path.stem
    image = path.with_suffix(".png")
    found = PresetFile(
        name=name,
        path=path,
        title=path.stem,
        summary="",
        thumbnail=image if image.is_file() else None,
        built_in=built_in,
    )
    if isinstance(preset, str):
        return replace(found, problem=preset)
    adapters = ", ".join(
        f"{entry.name or Path(entry.path).stem}:{format_weight(entry.weight)}" for entry in preset.adapters
    )
    return replace(found, title=preset.name, summary="; ".join(filter(None, (preset.description, adapters))))


def get_preset(studio: Studio, name: str) -> PresetFile:
    """Return the preset with this name in the list.

    Raises:
        ConfigError: If there is none, or it cannot be read.
    """
    if not name:
        raise ConfigError("choose a preset first")
    found = next((preset for preset in list_saved_presets(studio) if preset.name == name), None)
    if found is None:
        raise ConfigError(f"no preset is called {name!r}; choose one from the list")
    if found.problem:
        raise ConfigError(found.problem)
    return found


def _get_own_preset(studio: Studio, name: str) -> PresetFile:
    """Return a preset that may be changed. Raises ConfigError for a packaged one."""
    found = get_preset(studio, name)
    if found.built_in:
        raise ConfigError(f"{name}: built-in presets cannot be changed; load it and save it under another name")
    return found


def save_preset(
    studio: Studio, form: BlendForm, name: str, description: str, image: Path | None, *, overwrite: bool
) -> PresetFile:
    """Save a form as a preset.

    Args:
        studio: The studio.
        form: The values of the Blend tab.
        name: Name of the preset and of its file.
        description: What the preset is good for.
        image: Image to copy as the thumbnail.
        overwrite: Whether to replace a preset of the same name.

    Raises:
        ConfigError: If the name or the form is invalid.
        OutputError: If the name is taken and `overwrite` is False.
    """
    file = studio.config.presets / f"{check_file_name(name)}.json"
    request = studio.make_request(_with_default_prompt(form))
    saved = save_request_as_preset(
        request,
        file,
        LoadConfig(),
        studio.resolver,
        name=name.strip(),
        description=description,
        force=overwrite,
    )
    if image and image.is_file():
        shutil.copyfile(image, file.with_suffix(".png"))
    return _describe_preset(file, saved.preset, built_in=False)


def _with_default_prompt(form: BlendForm) -> BlendForm:
    """Return the form with the adapters' names as its prompt if the prompt is empty."""
    if str(form.settings.get("prompt", "")).strip():
        return form
    prompt = ", ".join(slot.name.removesuffix(".safetensors") for slot in form.slots) or "a picture"
    return replace(form, settings={**form.settings, "prompt": prompt})


def format_preset_commands(studio: Studio, name: str) -> str:
    """Return the commands that show, check and generate with a preset.

    Raises:
        ConfigError: If there is no preset of this name.
    """
    path = str(get_preset(studio, name).path)
    return "\n".join(
        shlex.join(["lora-diffusion", *words])
        for words in (
            ("preset", "show", path),
            ("preset", "check", path),
            ("generate", "--preset", path, "--output", str(studio.config.output)),
        )
    )


def rename_preset(studio: Studio, name: str, new_name: str) -> PresetFile:
    """Rename a preset and its thumbnail.

    Raises:
        ConfigError: If the preset is built in, or the new name is taken or invalid.
    """
    found = _get_own_preset(studio, name)
    target = studio.config.presets / f"{check_file_name(new_name)}.json"
    _check_free(target, new_name)
    found.path.rename(target)
    if found.thumbnail:
        found.thumbnail.rename(target.with_suffix(".png"))
    return get_preset(studio, target.stem)


def _check_free(target: Path, name: str) -> None:
    if target.exists():
        raise ConfigError(f"a preset called {name!r} already exists; choose another name")


def delete_preset(studio: Studio, name: str) -> None:
    """Move a preset and its thumbnail to the folder `deleted presets`, from which they can be restored.

    Raises:
        ConfigError: If the preset is built in, or there is none of this name.
    """
    found = _get_own_preset(studio, name)
    folder = studio.config.output / "deleted presets"
    folder.mkdir(exist_ok=True)
    for path in filter(None, (found.path, found.thumbnail)):
        path.replace(folder / path.name)


def import_preset(studio: Studio, file: Path, name: str) -> PresetFile:
    """Import a preset file, with those of its adapters that are in the library.

    Raises:
        ConfigError: If the file is not a preset, the name is taken, or none of the adapters are in the library.
    """
    preset = read_preset(file)
    _check_free(studio.config.presets / f"{check_file_name(name)}.json", name)
    form, notes = studio.form_from_preset(file)
    if not form.slots and notes:
        raise ConfigError(f"{name}: none of its adapters are in the library: {'; '.join(notes)}")
    return save_preset(studio, form, name, preset.description, None, overwrite=False)
