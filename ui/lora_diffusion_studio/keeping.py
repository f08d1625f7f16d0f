"""Presets as a studio keeps them: those that come with the package, and its own, each with a thumbnail beside it."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.errors import ConfigError
from lora_diffusion.library.presets import list_presets, read_preset
from lora_diffusion.prompts.tags import format_weight
from lora_diffusion.workflows.images.generate import Means, save_plan
from lora_diffusion_studio.forms import Form
from lora_diffusion_studio.studio import Studio, checked_name, stock_presets_folder


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A preset in the list."""

    name: str
    """As it is chosen by: the file's name without its suffix, for those of the package with a mark."""
    path: Path
    title: str
    about: str
    thumbnail: Path | None
    own: bool
    problem: str = ""


def kept_presets(studio: Studio) -> list[Kept]:
    """All presets; one that cannot be read is there with its problem."""
    folders = ((studio.places.presets, True), (stock_presets_folder(), False))
    return [kept_one(path, found, own=own) for folder, own in folders for path, found in list_presets(folder)]


def kept_one(path: Path, found: object, *, own: bool) -> Kept:
    name = path.stem if own else f"{path.stem} (ready)"
    thumbnail = path.with_suffix(".png")
    picture = thumbnail if thumbnail.is_file() else None
    if isinstance(found, str):
        return Kept(name=name, path=path, title=path.stem, about="", thumbnail=picture, own=own, problem=found)
    preset = read_preset(path)
    adapters = ", ".join(
        f"{entry.name or Path(entry.path).stem}:{format_weight(entry.weight)}" for entry in preset.adapters
    )
    about = "; ".join(filter(None, (preset.description, adapters)))
    return Kept(name=name, path=path, title=preset.name, about=about, thumbnail=picture, own=own)


def kept_preset(studio: Studio, name: str) -> Kept:
    """The one of that name. Raises ConfigError for one that is not there or cannot be read."""
    found = next((kept for kept in kept_presets(studio) if kept.name == name), None)
    if found is None:
        raise ConfigError(f"no preset called {name!r}; choose one from the list")
    if found.problem:
        raise ConfigError(found.problem)
    return found


def own_preset(studio: Studio, name: str) -> Kept:
    """The same, if it may be changed. Raises ConfigError for one that came with the package."""
    found = kept_preset(studio, name)
    if not found.own:
        raise ConfigError(f"{name}: comes with the package and stays as it is; save it under a name of your own")
    return found


def keep(studio: Studio, form: Form, name: str, description: str, picture: Path | None, *, replace: bool) -> Kept:
    """Save a form as a preset, with a picture as its thumbnail.

    Raises ConfigError for a name that cannot be one and for a form that cannot be saved, OutputError for a name that
    is taken unless `replace` says so.
    """
    file = studio.places.presets / f"{checked_name(name)}.json"
    prompted = form if str(form.settings.get("prompt", "")).strip() else with_prompt(form)
    plan = studio.plan(prompted)
    saved = save_plan(
        plan, file, Means(resolver=studio.shelf), name=name.strip(), description=description, force=replace
    )
    if picture and picture.is_file():
        shutil.copyfile(picture, file.with_suffix(".png"))
    return kept_one(file, saved.preset, own=True)


def with_prompt(form: Form) -> Form:
    """A preset may go without a prompt; the adapters' names stand in for it."""
    words = ", ".join(row.name.removesuffix(".safetensors") for row in form.rows) or "a picture"
    return Form(
        base=form.base,
        rows=form.rows,
        mode=form.mode,
        settings={**form.settings, "prompt": words},
        composition=form.composition,
    )


def preset_commands(studio: Studio, name: str) -> str:
    """What shows, checks and draws a preset on the command line. Raises ConfigError for one that is not there."""
    path = str(kept_preset(studio, name).path)
    return "\n".join(
        shlex.join(["lora-diffusion", *words])
        for words in (
            ("preset", "show", path),
            ("preset", "check", path),
            ("generate", "--preset", path, "--output", str(studio.places.output)),
        )
    )


def rename(studio: Studio, name: str, new: str) -> Kept:
    """Raises ConfigError for a name that is taken or cannot be one."""
    found, target = own_preset(studio, name), studio.places.presets / f"{checked_name(new)}.json"
    if target.exists():
        raise ConfigError(f"{new}: there is a preset of that name; choose another")
    found.path.rename(target)
    if found.thumbnail:
        found.thumbnail.rename(target.with_suffix(".png"))
    return kept_preset(studio, target.stem)


def discard(studio: Studio, name: str) -> None:
    """Move a preset out of the list, into the folder `discarded`, where it can be had back."""
    found = own_preset(studio, name)
    bin_folder = studio.places.output / "discarded"
    bin_folder.mkdir(exist_ok=True)
    for path in filter(None, (found.path, found.thumbnail)):
        path.replace(bin_folder / path.name)


def bring_in(studio: Studio, file: Path, name: str) -> Kept:
    """A preset from a file that a visitor has. Raises ConfigError for one that is none, or whose name is taken."""
    read_preset(file)
    target = studio.places.presets / f"{checked_name(name)}.json"
    if target.exists():
        raise ConfigError(f"{name}: there is a preset of that name; rename one of them")
    form, missing = studio.preset_form(file)
    if not form.rows and missing:
        raise ConfigError(f"{name}: none of its adapters are here: {'; '.join(missing)}")
    return keep(studio, form, name, read_preset(file).description, None, replace=False)
