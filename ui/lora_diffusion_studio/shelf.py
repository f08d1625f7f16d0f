"""The adapters themselves: what is in one, whether it is sound, how it relates to others, and the notes beside it."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.config.adapter_files import ConvertConfig
from lora_diffusion.config.settings import Dialect
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.errors import ConfigError
from lora_diffusion.evaluation.plots import save_analysis_plots
from lora_diffusion.library.search import find_adapter
from lora_diffusion.workflows.adapters.analyze import analyze_files
from lora_diffusion.workflows.adapters.convert import convert
from lora_diffusion.workflows.adapters.inspect import inspect_adapter
from lora_diffusion.workflows.adapters.verify import describe_checks, verify
from lora_diffusion_studio.rows import LEAST, MOST
from lora_diffusion_studio.studio import Studio, check_name


@dataclass(frozen=True, kw_only=True)
class AdapterNotes:
    """Notes on an adapter, in the JSON file that A1111, Forge and the Lora Manager use too."""

    weight: float = 1.0
    """Preferred weight."""
    range: tuple[float, float] = (LEAST, MOST)
    """Ends of its weight slider."""
    triggers: str = ""
    """Activation text."""
    notes: str = ""


def find_file(studio: Studio, name: str) -> Path:
    """Return an adapter's file. Raises ConfigError for one that is not in the library."""
    if not name:
        raise ConfigError("choose an adapter first")
    return find_adapter(studio.library(), name).path


def inspect_rows(studio: Studio, name: str) -> list[tuple[str, str]]:
    """Return the facts of an adapter as rows. Raises AdapterFormatError."""
    facts = inspect_adapter(find_file(studio, name))
    shown = {key: value for key, value in facts.items() if value not in ("", [], {}, None) and key != "file"}
    return [
        (key.replace("_", " "), value if isinstance(value, str) else json.dumps(value)) for key, value in shown.items()
    ]


def verify_adapter(studio: Studio, name: str, base: str) -> str:
    """Return each check and its result."""
    studio.check_base(base)
    return describe_checks(verify(find_file(studio, name), base=base))


def convert_adapter(studio: Studio, name: str, dialect: Dialect) -> tuple[Path, str]:
    """Write a copy in another layout into the output folder. Raises LoRADiffusionError's children."""
    source = find_file(studio, name)
    target = studio.places.output / "adapters" / f"{source.stem}-{dialect}.safetensors"
    if target.exists():
        raise ConfigError(f"{target.name}: is there already in the output folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    done = convert(source, target, ConvertConfig(to=dialect))
    return target, f"{target.name}: {done.rounding_error:.2%} changed by rounding"


def draw_plots(studio: Studio, names: Sequence[str], base: str) -> list[Path]:
    """Draw spectra and norms by block of adapters, and for several their overlap.

    Raises LoRADiffusionError's children.
    """
    studio.check_base(base)
    if not names:
        raise ConfigError("choose one adapter or several")
    folder = studio.places.output / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    facts = analyze_files([find_file(studio, name) for name in names], base=base)
    return save_analysis_plots(facts, folder)


def read_notes(studio: Studio, name: str) -> AdapterNotes:
    """Read the notes on an adapter. Raises ConfigError."""
    table, card = read_sidecar(find_file(studio, name)), studio.card(name)
    triggers, notes = (str(table.get(key, "")) for key in ("activation text", "notes"))
    return AdapterNotes(weight=card.preferred, range=card.range, triggers=triggers, notes=notes)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read the JSON file beside an adapter; empty if there is none. Raises ConfigError for an unreadable one."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        table = json.loads(beside.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{beside.name}: cannot be read ({error}); mend or remove it") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{beside.name}: is no JSON object; mend or remove it")
    return table


def write_notes(studio: Studio, name: str, told: AdapterNotes) -> None:
    """Write the notes beside the adapter, preserving other entries. Raises ConfigError, OutputError."""
    path = find_file(studio, name)
    if not all(map(math.isfinite, (told.weight, *told.range))) or told.range[0] >= told.range[1]:
        raise ConfigError(f"a slider from {told.range[0]:g} to {told.range[1]:g} has no length; give rising numbers")
    table = {
        **read_sidecar(path),
        "preferred weight": told.weight,
        "activation text": told.triggers.strip(),
        "notes": told.notes.strip(),
    }
    table.pop("weight range", None)
    if told.range != (LEAST, MOST):
        table["weight range"] = list(told.range)
    with atomic_file(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(table, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def rename_adapter(studio: Studio, name: str, new: str) -> str:
    """Rename an adapter and the files beside it; returns the new name. Raises ConfigError."""
    path = find_file(studio, name)
    target = path.with_name(check_name(new) + path.suffix)
    if target.exists():
        raise ConfigError(f"{new}: there is an adapter of that name; choose another")
    beside = [each for each in path.parent.iterdir() if each != path and each.name.startswith(f"{path.stem}.")]
    path.rename(target)
    for each in beside:
        each.rename(target.with_name(target.stem + each.name[len(path.stem) :]))
    return target.relative_to(studio.library().folder).as_posix()


def set_preview(studio: Studio, name: str, picture: Path) -> None:
    """A picture beside the adapter, which cards show. Raises OutputError."""
    path = find_file(studio, name)
    with Image.open(picture) as opened, atomic_file(path.with_suffix(".png")) as part:
        opened.convert("RGB").save(part, format="PNG")


def format_commands(studio: Studio, name: str, several: Sequence[str], base: str) -> str:
    """Return the commands that inspect, verify, convert and plot. Raises ConfigError for unknown adapters."""
    asked: list[tuple[str, ...]] = []
    if name:
        file = find_file(studio, name)
        copy = studio.places.output / "adapters" / f"{file.stem}-kohya.safetensors"
        asked += [("inspect", str(file)), ("verify", str(file), "--base", base)]
        asked += [("convert", str(file), str(copy), "--to", "kohya")]
    files = [str(find_file(studio, each)) for each in several]
    asked += [("analyze", *files, "--base", base, "--plots", str(studio.places.output / "plots"))] * bool(files)
    if not asked:
        raise ConfigError("choose an adapter to look at, or several to draw")
    return "\n".join(shlex.join(["lora-diffusion", *words]) for words in asked)
