"""Read, write, list and describe blend presets, which are JSON files.

Paths in a preset are relative to the folder of the preset file.
"""

import os
from pathlib import Path

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.preset import BlendPreset, Region
from lora_diffusion.core.atomic_files import atomic_file, check_output_free
from lora_diffusion.core.tables import format_table
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.references import make_references
from lora_diffusion.prompts.tags import format_weight


def read_preset(path: str | os.PathLike[str]) -> BlendPreset:
    """Read a blend preset from a JSON file.

    Raises:
        ConfigError: If the file cannot be read or is not a valid preset.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a blend preset as JSON") from None
    return BlendPreset.from_json(text, source=str(path))


def save_preset(preset: BlendPreset, path: str | os.PathLike[str], blend: Blend, *, force: bool = False) -> BlendPreset:
    """Write a preset with references to the adapters of a blend: by relative path, by name and by hash.

    Args:
        preset: The settings to save; its adapters are replaced by those of `blend`.
        path: The JSON file to write.
        blend: The loaded adapters.
        force: Whether to replace an existing file.

    Returns:
        The preset as it was written.

    Raises:
        OutputError: If the file exists and `force` is not given, or if it cannot be written.
    """
    path = Path(path)
    check_output_free(path, force=force)
    complete = preset.model_copy(update={"adapters": make_references(blend, path.parent)})
    with atomic_file(path) as part:
        part.write_text(complete.model_dump_json(indent=2, exclude_defaults=True) + "\n", encoding="utf-8")
    return complete


def list_presets(folder: str | os.PathLike[str]) -> list[tuple[Path, BlendPreset | str]]:
    """Read every JSON file below a folder as a preset.

    Returns:
        For each file, sorted by path, the preset or the message that says why it is not one.

    Raises:
        ConfigError: If there is no such folder.
    """
    folder = Path(folder)
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
    """Format a preset as a table of names and values."""
    rows = [("name", preset.name), ("base", preset.base)]
    rows += [("description", preset.description)] * bool(preset.description)
    rows += [
        ("adapter", f"{e.name or e.path}:{format_weight(e.weight)}{_format_region(e.region)}") for e in preset.adapters
    ]
    changed = preset.composition.model_dump(exclude_defaults=True)
    changed |= preset.settings.model_dump(exclude_defaults=True) if preset.settings else {}
    rows += [(key.replace("_", " "), str(value)) for key, value in changed.items()]
    return format_table([], rows, left=(0, 1))


def _format_region(region: Region | None) -> str:
    """Format a region as ` in <mask file>` or ` in <left, top, right, bottom>`."""
    if region is None:
        return ""
    return f" in {region.mask or ', '.join(f'{side:g}' for side in region.box or ())}"
