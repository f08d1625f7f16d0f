"""Preset files: read, written with paths from their own folder, listed and described."""

from pathlib import Path

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.preset import BlendPreset, Region
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.library.references import make_references
from lora_diffusion.prompts.tags import format_weight


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
    whole = preset.model_copy(update={"adapters": make_references(blend, path.parent)})
    with atomic_file(path) as part:
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
    lines += [
        f"{'adapter':<14}{e.name or e.path}:{format_weight(e.weight)}{format_region(e.region)}" for e in preset.adapters
    ]
    changed = preset.composition.model_dump(exclude_defaults=True)
    lines += [f"{key.replace('_', ' '):<14}{value}" for key, value in changed.items()]
    kept = preset.settings.model_dump(exclude_defaults=True) if preset.settings else {}
    return "\n".join([*lines, *(f"{key.replace('_', ' '):<14}{value}" for key, value in kept.items())])


def format_region(region: Region | None) -> str:
    if region is None:
        return ""
    return f" in {region.mask or ', '.join(f'{side:g}' for side in region.box or ())}"
