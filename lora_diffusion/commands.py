"""What the commands do between their flags and the library: find files, load, run, write."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lora_diffusion.blend import Blend, WeightedAdapter, check_family
from lora_diffusion.config import GenerateConfig, WeightType, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.files import check_writable
from lora_diffusion.formats.diffusers_folder import anatomy_of_folder
from lora_diffusion.formats.reading import load_adapter, outline_adapter
from lora_diffusion.merging import MergeReport, merge
from lora_diffusion.models import Base, find_base, load_base
from lora_diffusion.precision import torch_dtype
from lora_diffusion.preset import BlendEntry, BlendPreset
from lora_diffusion.recipe import Recipe, differences, read_recipe
from lora_diffusion.sampling import Picture, generate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Pictures to make: base, adapters by reference, settings; for a replay also the recipe to hold to."""

    base: str
    entries: tuple[BlendEntry, ...]
    settings: GenerateConfig
    recipe: Recipe | None = None
    ignore: tuple[str, ...] = ()
    """Patterns of keys that adapter files may hold without being understood."""


def preset_plan(path: Path, *, base: str, settings: Mapping[str, Any], adapters: tuple[BlendEntry, ...]) -> Plan:
    """Pictures from a preset; what is given besides wins over it. Raises ConfigError."""
    preset = read_preset(path)
    kept = preset.settings.model_dump() if preset.settings else {}
    found = tuple(e.model_copy(update={"path": str(path.parent / e.path)}) for e in preset.adapters)
    return Plan(
        base=base or preset.base,
        entries=found + adapters,
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


def refuse_other_families(entries: Iterable[BlendEntry], base: str, ignore: Sequence[str] = ()) -> None:
    """Raise FamilyMismatchError for an adapter of another family than the base's, from the files' headers alone."""
    family, _ = anatomy_of_folder(find_base(base))
    for entry in entries:
        outline = outline_adapter(Path(entry.path), ignore=ignore)
        check_family(outline.metadata.family, outline.metadata.name, base_name=base, family=family.name)


def load_blend(entries: Iterable[BlendEntry], *, folder: Path | None = None, ignore: Sequence[str] = ()) -> Blend:
    """The adapters that a preset or recipe refers to, checked against their hashes.

    Relative paths start at `folder`. Raises AdapterFormatError for a file that is no adapter, ConfigError for one
    whose content has changed.
    """
    weighted: list[WeightedAdapter] = []
    for entry in entries:
        path = (folder or Path()) / entry.path
        item = WeightedAdapter(adapter=load_adapter(path, ignore=ignore), weight=entry.weight, path=path)
        if entry.hash and item.hash != entry.hash:
            raise ConfigError(
                f"{path}: its content (hash {item.hash[:12]}) is not what the recipe was made with "
                f"({entry.hash[:12]}); give back the original file"
            )
        weighted.append(item)
    return Blend(entries=tuple(weighted))


def check_base_hash(base: Base, recipe: Recipe) -> None:
    """Raise ConfigError if the base is not the one that the recipe was made with."""
    if base.hash != recipe.base_hash:
        raise ConfigError(
            f"{base.name}: its weights (hash {base.hash[:12]}) are not those of the recipe ({recipe.base_hash[:12]}); "
            "give the original base with --base"
        )


@dataclass(frozen=True, kw_only=True)
class Written:
    """Files of finished pictures, and what may make a replay differ."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def generate_files(plan: Plan, output: Path) -> Written:
    """Make the pictures of a plan and write each into `output`, under names that are free, as soon as it is there.

    Raises LoRADiffusionError's children.
    """
    check_writable(output / "00000.png")
    refuse_other_families(plan.entries, plan.base, plan.ignore)
    blend = load_blend(plan.entries, ignore=plan.ignore)
    base = load_base(plan.base, precision=recipe_precision(plan.recipe))
    notes: list[str] = []
    if plan.recipe:
        check_base_hash(base, plan.recipe)
        notes = differences(plan.recipe, device=base.pipe.device.type)
    paths: list[Path] = []
    with tqdm(total=plan.settings.count, desc="generate", unit="picture", leave=False) as bar:

        def keep(picture: Picture) -> None:
            paths.append(free_name(output))
            picture.save(paths[-1])
            bar.update()

        generate(base, [plan.settings], blend, on_picture=keep)
    return Written(paths=tuple(paths), notes=tuple(notes))


def recipe_precision(recipe: Recipe | None) -> torch.dtype | None:
    """The type that a recipe was run in; None takes the device's own."""
    return torch_dtype(recipe.precision) if recipe else None


def free_name(folder: Path) -> Path:
    """The first five-digit PNG name after those already there."""
    taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()] if folder.is_dir() else []
    return folder / f"{max(taken, default=-1) + 1:05d}.png"


def merge_files(
    base: str, entries: tuple[BlendEntry, ...], output: Path, precision: WeightType, ignore: tuple[str, ...] = ()
) -> MergeReport:
    """Merge adapter files into a base. Raises LoRADiffusionError's children."""
    refuse_other_families(entries, base, ignore)
    return merge(base, load_blend(entries, ignore=ignore), output, dtype=precision)
