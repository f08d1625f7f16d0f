"""The files of the adapter library: inspect, verify, convert, plot and rename them, and edit the notes beside them."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image

from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.errors import ConfigError
from lora_diffusion.evaluation.plots import save_analysis_plots
from lora_diffusion.library.search import find_adapter
from lora_diffusion.workflows.adapters.analyze import analyze_files
from lora_diffusion.workflows.adapters.convert import ConvertConfig, Dialect, convert
from lora_diffusion.workflows.adapters.inspect import inspect_adapter
from lora_diffusion.workflows.adapters.verify import describe_checks, verify
from lora_diffusion_studio.backend.config import check_file_name
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import MAX_WEIGHT, MIN_WEIGHT


@dataclass(frozen=True, kw_only=True)
class AdapterNotes:
    """Notes on an adapter, stored in the JSON file beside it that A1111, Forge and the LoRA Manager also use."""

    preferred_weight: float = 1.0
    weight_range: tuple[float, float] = (MIN_WEIGHT, MAX_WEIGHT)
    """Minimum and maximum of the weight slider."""
    trigger_words: str = ""
    """Trigger words, separated by commas; A1111 calls them the activation text."""
    notes: str = ""


def find_file(studio: Studio, name: str) -> Path:
    """Return the file of an adapter.

    Raises:
        ConfigError: If no adapter is chosen, or it is not in the library.
    """
    if not name:
        raise ConfigError("choose an adapter first")
    return find_adapter(studio.open_library(), name).path


def inspect_rows(studio: Studio, name: str) -> list[tuple[str, str]]:
    """Return the properties of an adapter as pairs of name and value.

    Raises:
        AdapterFormatError: If the file cannot be read.
    """
    properties = inspect_adapter(find_file(studio, name))
    shown = {key: value for key, value in properties.items() if value not in ("", [], {}, None) and key != "file"}
    return [(key.replace("_", " "), _format_value(value)) for key, value in shown.items()]


def _format_value(value: object) -> str:
    """Return a property's value as text: lists with commas, tables as `min 8, max 16`."""
    if isinstance(value, dict):
        items = cast(dict[str, object], value).items()
        return ", ".join(f"{key} {_format_value(item)}" for key, item in items)
    if isinstance(value, list | tuple):
        return ", ".join(_format_value(item) for item in cast(list[object], value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def verify_adapter(studio: Studio, name: str, base: str) -> str:
    """Return the result of each check of an adapter against a base model, one per line."""
    studio.check_base(base)
    return describe_checks(verify(find_file(studio, name), base=base))


def convert_adapter(studio: Studio, name: str, dialect: Dialect) -> tuple[Path, str]:
    """Write a copy in another format into the output folder, and return its path and a summary.

    Raises:
        ConfigError: If the copy already exists.
        LoRADiffusionError: If the adapter cannot be converted.
    """
    source = find_file(studio, name)
    target = studio.config.output / "adapters" / f"{source.stem}-{dialect}.safetensors"
    if target.exists():
        raise ConfigError(f"{target} already exists; delete or rename it to convert again")
    target.parent.mkdir(parents=True, exist_ok=True)
    result = convert(source, target, ConvertConfig(to=dialect))
    return target, f"{target.name} written; rounding error {result.rounding_error:.2%}"


def save_plots(studio: Studio, names: Sequence[str], base: str) -> list[Path]:
    """Plot the spectra and norms of adapters by block, and the overlap of several.

    Raises:
        ConfigError: If no adapter is chosen.
        LoRADiffusionError: If an adapter cannot be read or does not fit the base model.
    """
    studio.check_base(base)
    if not names:
        raise ConfigError("choose one or more adapters to plot")
    folder = studio.config.output / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    return save_analysis_plots(analyze_files([find_file(studio, name) for name in names], base=base), folder)


def read_notes(studio: Studio, name: str) -> AdapterNotes:
    """Return the notes on an adapter, with default values where there are none.

    Raises:
        ConfigError: If the adapter is not in the library, or the JSON file beside it cannot be read.
    """
    table, card = _read_sidecar(find_file(studio, name)), studio.get_card(name)
    return AdapterNotes(
        preferred_weight=card.preferred_weight,
        weight_range=card.weight_range,
        trigger_words=str(table.get("activation text", "")),
        notes=str(table.get("notes", "")),
    )


def _read_sidecar(adapter: Path) -> dict[str, Any]:
    """Return the content of the JSON file beside an adapter, which is empty if there is no such file."""
    file = adapter.with_suffix(".json")
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file.name} cannot be read ({error}); repair or delete it") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{file.name} is not a JSON object; repair or delete it")
    return cast(dict[str, Any], table)


def write_notes(studio: Studio, name: str, notes: AdapterNotes) -> None:
    """Write the notes on an adapter to the JSON file beside it, keeping its other entries.

    Raises:
        ConfigError: If the slider range is not increasing, or a number is not finite.
        OutputError: If the file cannot be written.
    """
    path = find_file(studio, name)
    lowest, highest = notes.weight_range
    if not all(map(math.isfinite, (notes.preferred_weight, lowest, highest))) or lowest >= highest:
        raise ConfigError(f"the slider minimum ({lowest:g}) must be less than the slider maximum ({highest:g})")
    table = {
        **_read_sidecar(path),
        "preferred weight": notes.preferred_weight,
        "activation text": notes.trigger_words.strip(),
        "notes": notes.notes.strip(),
    }
    table.pop("weight range", None)
    if notes.weight_range != (MIN_WEIGHT, MAX_WEIGHT):
        table["weight range"] = list(notes.weight_range)
    with atomic_file(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(table, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def rename_adapter(studio: Studio, name: str, new_name: str) -> str:
    """Rename an adapter and the files beside it, and return its new name in the library.

    Raises:
        ConfigError: If the new name is invalid or taken.
    """
    path = find_file(studio, name)
    target = path.with_name(check_file_name(new_name) + path.suffix)
    if target.exists():
        raise ConfigError(f"an adapter called {new_name!r} already exists; choose another name")
    beside = [each for each in path.parent.iterdir() if each != path and each.name.startswith(f"{path.stem}.")]
    path.rename(target)
    for each in beside:
        each.rename(target.with_name(target.stem + each.name[len(path.stem) :]))
    return target.relative_to(studio.open_library().folder).as_posix()


def set_preview(studio: Studio, name: str, image: Path) -> None:
    """Save an image as the preview of an adapter, in a PNG file beside it.

    Raises:
        OutputError: If the file cannot be written.
    """
    path = find_file(studio, name)
    with Image.open(image) as opened, atomic_file(path.with_suffix(".png")) as part:
        opened.convert("RGB").save(part, format="PNG")


def format_library_commands(studio: Studio, name: str, plotted: Sequence[str], base: str) -> str:
    """Return the commands that inspect, verify and convert an adapter, and plot several.

    Raises:
        ConfigError: If no adapter is chosen, or one is not in the library.
    """
    commands: list[tuple[str, ...]] = []
    if name:
        file = find_file(studio, name)
        copy = studio.config.output / "adapters" / f"{file.stem}-kohya.safetensors"
        commands += [("inspect", str(file)), ("verify", str(file), "--base", base)]
        commands += [("convert", str(file), str(copy), "--to", "kohya")]
    if plotted:
        files = [str(find_file(studio, each)) for each in plotted]
        commands += [("analyze", *files, "--base", base, "--plots", str(studio.config.output / "plots"))]
    if not commands:
        raise ConfigError("choose an adapter first, or adapters to plot")
    return "\n".join(shlex.join(["lora-diffusion", *words]) for words in commands)
