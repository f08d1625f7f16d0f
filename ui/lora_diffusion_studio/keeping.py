"""Presets as a studio keeps them: those that come with the package, and its own, each with a thumbnail beside it."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.errors import ConfigError
from lora_diffusion.library.presets import list_presets, read_preset
from lora_diffusion.prompts.tags import format_weight
from lora_diffusion.workflows.images.generate import LoadOptions, save_request_as_preset
from lora_diffusion_studio.forms import BlendForm
from lora_diffusion_studio.studio import Studio, check_name, stock_presets_folder


@dataclass(frozen=True, kw_only=True)
class SavedPreset:
    """A preset in the list."""

    name: str
    """As it is chosen by: the file's name without its suffix, for those of the package with a mark."""
    path: Path
    title: str
    about: str
    thumbnail: Path | None
    own: bool
    problem: str = ""


def list_saved_presets(studio: Studio) -> list[SavedPreset]:
    """List all presets; unreadable ones are included with their problem."""
    folders = ((studio.places.presets, True), (stock_presets_folder(), False))
    return [load_preset(path, found, own=own) for folder, own in folders for path, found in list_presets(folder)]


def load_preset(path: Path, found: object, *, own: bool) -> SavedPreset:
    name = path.stem if own else f"{path.stem} (ready)"
    thumbnail = path.with_suffix(".png")
    picture = thumbnail if thumbnail.is_file() else None
    if isinstance(found, str):
        return SavedPreset(name=name, path=path, title=path.stem, about="", thumbnail=picture, own=own, problem=found)
    preset = read_preset(path)
    adapters = ", ".join(
        f"{entry.name or Path(entry.path).stem}:{format_weight(entry.weight)}" for entry in preset.adapters
    )
    about = "; ".join(filter(None, (preset.description, adapters)))
    return SavedPreset(name=name, path=path, title=preset.name, about=about, thumbnail=picture, own=own)


def get_preset(studio: Studio, name: str) -> SavedPreset:
    """Return the preset with this name. Raises ConfigError if there is none or it cannot be read."""
    found = next((kept for kept in list_saved_presets(studio) if kept.name == name), None)
    if found is None:
        raise ConfigError(f"no preset called {name!r}; choose one from the list")
    if found.problem:
        raise ConfigError(found.problem)
    return found


def get_own_preset(studio: Studio, name: str) -> SavedPreset:
    """Return a preset that may be changed. Raises ConfigError for one that came with the package."""
    found = get_preset(studio, name)
    if not found.own:
        raise ConfigError(f"{name}: comes with the package and stays as it is; save it under a name of your own")
    return found


def save_form(
    studio: Studio, form: BlendForm, name: str, description: str, picture: Path | None, *, replace: bool
) -> SavedPreset:
    """Save a form as a preset, with a picture as its thumbnail.

    Raises ConfigError for a name that cannot be one and for a form that cannot be saved, OutputError for a name that
    is taken unless `replace` says so.
    """
    file = studio.places.presets / f"{check_name(name)}.json"
    prompted = form if str(form.settings.get("prompt", "")).strip() else with_default_prompt(form)
    request = studio.make_request(prompted)
    saved = save_request_as_preset(
        request, file, LoadOptions(resolver=studio.resolver), name=name.strip(), description=description, force=replace
    )
    if picture and picture.is_file():
        shutil.copyfile(picture, file.with_suffix(".png"))
    return load_preset(file, saved.preset, own=True)


def with_default_prompt(form: BlendForm) -> BlendForm:
    """Return the form with the adapters' names as prompt if it has none."""
    words = ", ".join(row.name.removesuffix(".safetensors") for row in form.rows) or "a picture"
    return BlendForm(
        base=form.base,
        rows=form.rows,
        mode=form.mode,
        settings={**form.settings, "prompt": words},
        composition=form.composition,
    )


def preset_commands(studio: Studio, name: str) -> str:
    """What shows, checks and draws a preset on the command line. Raises ConfigError for one that is not there."""
    path = str(get_preset(studio, name).path)
    return "\n".join(
        shlex.join(["lora-diffusion", *words])
        for words in (
            ("preset", "show", path),
            ("preset", "check", path),
            ("generate", "--preset", path, "--output", str(studio.places.output)),
        )
    )


def rename_preset(studio: Studio, name: str, new: str) -> SavedPreset:
    """Rename a preset. Raises ConfigError for a name that is taken or invalid."""
    found, target = get_own_preset(studio, name), studio.places.presets / f"{check_name(new)}.json"
    if target.exists():
        raise ConfigError(f"{new}: there is a preset of that name; choose another")
    found.path.rename(target)
    if found.thumbnail:
        found.thumbnail.rename(target.with_suffix(".png"))
    return get_preset(studio, target.stem)


def discard_preset(studio: Studio, name: str) -> None:
    """Move a preset into the folder `discarded`, from which it can be restored."""
    found = get_own_preset(studio, name)
    bin_folder = studio.places.output / "discarded"
    bin_folder.mkdir(exist_ok=True)
    for path in filter(None, (found.path, found.thumbnail)):
        path.replace(bin_folder / path.name)


def import_preset(studio: Studio, file: Path, name: str) -> SavedPreset:
    """Import a preset file. Raises ConfigError for an invalid file or a name that is taken."""
    read_preset(file)
    target = studio.places.presets / f"{check_name(name)}.json"
    if target.exists():
        raise ConfigError(f"{name}: there is a preset of that name; rename one of them")
    form, missing = studio.form_from_preset(file)
    if not form.rows and missing:
        raise ConfigError(f"{name}: none of its adapters are here: {'; '.join(missing)}")
    return save_form(studio, form, name, read_preset(file).description, None, replace=False)
