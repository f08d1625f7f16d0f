"""Preset files: read, written with paths from their own folder, listed, described and checked."""

from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.coefficients import check_mode, is_off, spelled_out
from lora_diffusion.adapters.masks import region_mask
from lora_diffusion.architectures.module_paths import Anatomy
from lora_diffusion.config.preset import BlendEntry, BlendPreset, Region
from lora_diffusion.core.atomic_files import whole_file
from lora_diffusion.errors import ConfigError, LoRADiffusionError, OutputError
from lora_diffusion.formats.checkpoints.diffusers import anatomy_of_folder
from lora_diffusion.library.references import Shelf, anchored_entries, load_blend, references
from lora_diffusion.models.load import find_base
from lora_diffusion.prompts.tags import weight_text


def read_preset(path: Path) -> BlendPreset:
    """A blend preset from its JSON file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a blend preset as JSON") from None
    return BlendPreset.from_json(text, source=str(path))


def save_preset(preset: BlendPreset, path: Path, blend: Blend, *, force: bool = False) -> BlendPreset:
    """Write a preset with the adapters of a blend, by path from the file's folder, by name and by hash.

    Raises OutputError if there is a file already and `force` does not say to replace it, or if it cannot be written.
    """
    if path.exists() and not force:
        raise OutputError(f"{path}: already there; give another file, or --force to replace it")
    whole = preset.model_copy(update={"adapters": references(blend, path.parent)})
    with whole_file(path) as part:
        part.write_text(whole.model_dump_json(indent=2, exclude_defaults=True) + "\n", encoding="utf-8")
    return whole


def list_presets(folder: Path) -> list[tuple[Path, BlendPreset | str]]:
    """Every preset below a folder, or why a JSON file there is none. Raises ConfigError if there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a folder of presets (.json)")
    found: list[tuple[Path, BlendPreset | str]] = []
    for path in sorted(folder.rglob("*.json")):
        try:
            found.append((path, read_preset(path)))
        except ConfigError as error:
            found.append((path, str(error)))
    return found


def describe_preset(preset: BlendPreset) -> str:
    """A preset as aligned lines of text."""
    lines = [f"{'name':<14}{preset.name}", f"{'base':<14}{preset.base}"]
    lines += [f"{'description':<14}{preset.description}"] * bool(preset.description)
    lines += [f"{'adapter':<14}{e.name or e.path}:{weight_text(e.weight)}{placed(e.region)}" for e in preset.adapters]
    changed = preset.composition.model_dump(exclude_defaults=True)
    lines += [f"{key.replace('_', ' '):<14}{value}" for key, value in changed.items()]
    kept = preset.settings.model_dump(exclude_defaults=True) if preset.settings else {}
    return "\n".join([*lines, *(f"{key.replace('_', ' '):<14}{value}" for key, value in kept.items())])


def placed(region: Region | None) -> str:
    if region is None:
        return ""
    return f" in {region.mask or ', '.join(f'{side:g}' for side in region.box or ())}"


def check_preset(path: Path, shelf: Shelf, ignore: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What is wrong with a preset: pairs of what was checked and what came of it, empty if all is well.

    Each adapter has to be found with its hash, its weight has to fit its base, and all have to go together.
    """
    preset = read_preset(path)
    checks: list[tuple[str, str]] = []
    try:
        family, anatomy = anatomy_of_folder(find_base(preset.base))
        checks.append((f"base {preset.base}", ""))
    except LoRADiffusionError as error:
        checks.append((f"base {preset.base}", str(error)))
        family = anatomy = None
    for entry in anchored_entries(preset.adapters, path.parent):
        checks.append(
            (
                f"adapter {entry.name or entry.path}",
                problem_with(entry, shelf, ignore, family.name if family else "", anatomy),
            )
        )
    checks.append(("composition", problem_together(preset)))
    return checks


def problem_together(preset: BlendPreset) -> str:
    """Why its adapters cannot come together as the preset says; empty if they can."""
    active = sum(not is_off(entry.weight) for entry in preset.adapters)
    try:
        check_mode(preset.composition, active, regions=any(entry.region for entry in preset.adapters))
    except ConfigError as error:
        return str(error)
    return ""


def problem_with(entry: BlendEntry, shelf: Shelf, ignore: Sequence[str], family: str, anatomy: Anatomy | None) -> str:
    """Why an adapter of a preset cannot be used as it says; empty if it can."""
    try:
        found = load_blend([entry], shelf, ignore=ignore)
        if entry.region:
            region_mask(entry.region)
        own = found.blend.entries[0].adapter.metadata.family
        if family and own and own != family:
            return f"is for {own}, the preset's base is {family}"
        if anatomy is not None:
            spelled_out(entry.weight, anatomy)
    except LoRADiffusionError as error:
        return str(error)
    return "; ".join(found.notes)
