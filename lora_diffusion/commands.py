"""What the commands do between their flags and the library: find files, load, run, write."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lora_diffusion.config import BlendEntry, BlendPreset, GenerateConfig, WeightType, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.files import check_writable
from lora_diffusion.merging import MergeReport, merge
from lora_diffusion.models import find_base, load_base
from lora_diffusion.recipe import Recipe, read_recipe, write_png
from lora_diffusion.sampling import check_base_hash, generate, load_blend


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Pictures to make: base, adapters by reference, settings; for a replay also the recipe to hold to."""

    base: str
    entries: tuple[BlendEntry, ...]
    settings: GenerateConfig
    folder: Path | None = None
    """Where relative adapter paths start."""
    recipe: Recipe | None = None


def prompt_plan(settings: GenerateConfig, *, base: str, adapters: tuple[BlendEntry, ...]) -> Plan:
    """Pictures from settings given one by one."""
    return Plan(base=base, entries=adapters, settings=settings)


def preset_plan(path: Path, *, base: str, settings: Mapping[str, Any], adapters: tuple[BlendEntry, ...]) -> Plan:
    """Pictures from a preset; what is given besides wins over it. Raises ConfigError."""
    preset = read_preset(path)
    kept = preset.settings.model_dump() if preset.settings else {}
    absolute = tuple(e.model_copy(update={"path": str(path.parent / e.path)}) for e in preset.adapters)
    return Plan(
        base=base or preset.base,
        entries=absolute + adapters,
        settings=validate(GenerateConfig, {**kept, **settings}, source=str(path)),
    )


def read_preset(path: Path) -> BlendPreset:
    """A blend preset from its JSON file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a blend preset as JSON") from None
    return BlendPreset.from_json(text, source=str(path))


def replay_plan(image: Path, *, base: str) -> Plan:
    """The picture in a PNG once more. Raises ConfigError if it carries no recipe for an image."""
    recipe = read_recipe(image)
    if recipe.kind != "image" or recipe.settings is None:
        raise ConfigError(f"{image}: carries the recipe of a {recipe.kind}, not of a picture")
    return Plan(base=base or recipe.base, entries=recipe.adapters, settings=recipe.settings, recipe=recipe)


def generate_files(plan: Plan, output: Path) -> list[Path]:
    """Make the pictures of a plan and write them into `output` under names that are free."""
    check_writable(output / "00000.png")
    blend, files = load_blend(plan.entries, folder=plan.folder)
    base = load_base(plan.base)
    if plan.recipe:
        check_base_hash(base, plan.recipe)
    pictures = generate(base, [plan.settings], blend, files=files)
    written: list[Path] = []
    for picture in tqdm(pictures, total=plan.settings.count, desc="generate", unit="picture", leave=False):
        path = free_name(output)
        write_png(picture.image, path, picture.recipe)
        written.append(path)
    return written


def free_name(folder: Path) -> Path:
    """The first five-digit PNG name after those already there."""
    taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdigit()] if folder.is_dir() else []
    return folder / f"{max(taken, default=-1) + 1:05d}.png"


def merge_files(base: str, entries: tuple[BlendEntry, ...], output: Path, precision: WeightType) -> MergeReport:
    """Merge adapter files into a base. Raises ConfigError if there is nothing to merge."""
    if not entries:
        raise ConfigError("nothing to merge; give at least one --adapter FILE[:WEIGHT]")
    blend, files = load_blend(entries)
    return merge(base, find_base(base), blend, output, files=files, dtype=precision)
