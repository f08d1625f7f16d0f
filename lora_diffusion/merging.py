"""Merge a blend into a checkpoint folder: tensor by tensor, in float32, rounded once."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from lora_diffusion.blend import Blend, blend_delta, blended_weight
from lora_diffusion.config import WeightType
from lora_diffusion.errors import FamilyMismatchError
from lora_diffusion.families import COMPONENTS, FAMILIES
from lora_diffusion.files import whole_folder
from lora_diffusion.formats.diffusers_folder import (
    anatomy_of_folder,
    base_hash,
    paths_of_folder,
    text_encoder_names,
    weight_files,
)
from lora_diffusion.formats.safetensors_file import TensorKind, stream_safetensors
from lora_diffusion.recipe import Recipe, blend_entries, library_versions

RECIPE_FILE = "lora_diffusion_recipe.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and what the output's precision swallowed."""

    output: Path
    merged_modules: int
    swallowed: float
    """Share of the blend's delta that rounding lost: norm of the error over norm of the delta."""


def merge(
    base: str,
    folder: Path,
    blend: Blend,
    output: Path,
    *,
    files: tuple[Path, ...],
    dtype: WeightType = "keep",
) -> MergeReport:
    """Write the base in `folder` (known to the user as `base`) with the blend in its weights to the folder `output`.

    Raises FamilyMismatchError if any layer finds no tensor, OutputError if `output` cannot be written; in both cases
    nothing is left behind.
    """
    places = find_places(folder, blend)
    recipe = Recipe(
        kind="merge",
        base=base,
        base_hash=base_hash(folder),
        adapters=blend_entries(blend, files),
        precision=dtype,
        versions=library_versions(),
    )
    lost = Losses()
    with whole_folder(output) as part:
        copy_small_files(folder, part)
        for component in ("unet", *text_encoder_names(folder), "vae"):
            for source in weight_files(folder, component):
                target = part / source.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                merge_file(source, target, places, blend, recipe, lost)
        (part / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card(recipe, lost.share), encoding="utf-8")
    return MergeReport(output=output, merged_modules=len(blend.paths), swallowed=lost.share)


@dataclass
class Losses:
    """Running sums of squared error and squared delta."""

    error: float = 0.0
    delta: float = 0.0

    @property
    def share(self) -> float:
        return (self.error / self.delta) ** 0.5 if self.delta else 0.0


def checkpoint_keys(path: str) -> tuple[str, ...]:
    """The names that a checkpoint file may have for the weight of a module: with and without `text_model`."""
    inner = path.split(".", 1)[1]
    return f"{inner}.weight", f"{inner.removeprefix('text_model.')}.weight"


def find_places(folder: Path, blend: Blend) -> dict[tuple[Path, str], str]:
    """(file, key) -> module path for every module of the blend.

    Raises FamilyMismatchError if one is missing or of another shape, before anything is written.
    """
    check_family(folder, blend)
    wanted = {(path.split(".", 1)[0], key): path for path in blend.paths for key in checkpoint_keys(path)}
    shapes = {path: tuple(blend_shape(blend, path)) for path in blend.paths}
    places: dict[tuple[Path, str], str] = {}
    for component in COMPONENTS:
        if not any(c == component for c, _ in wanted):
            continue
        for file, key, shape in tensors_of(folder, component):
            path = wanted.get((component, key))
            if path is None:
                continue
            if shape != shapes[path]:
                raise FamilyMismatchError(
                    f"{path}: the adapter is for a weight of shape {shapes[path]}, but {file.name} has {shape}; "
                    "use the base that it was trained on"
                )
            places[file, key] = path
    missing = sorted(set(blend.paths) - set(places.values()))
    if missing:
        raise FamilyMismatchError(
            f"{folder}: {len(missing)} of {len(blend.paths)} modules of the blend have no tensor in the checkpoint "
            f"(first: {missing[0]}); use the base that the adapters were trained on"
        )
    return places


def check_family(folder: Path, blend: Blend) -> None:
    family, _ = anatomy_of_folder(folder)
    if blend.family and blend.family != family.name:
        title = FAMILIES[blend.family].title if blend.family in FAMILIES else blend.family
        raise FamilyMismatchError(
            f"the blend is for {title}, but {folder} is {family.title}; use a base of the adapters' family"
        )
    unknown = sorted(set(blend.paths) - set(paths_of_folder(folder)))
    if unknown:
        raise FamilyMismatchError(
            f"{folder}: {len(unknown)} of {len(blend.paths)} modules of the blend are not in this base "
            f"(first: {unknown[0]}); use the base that the adapters were trained on"
        )


def blend_shape(blend: Blend, path: str) -> tuple[int, ...]:
    return next(e.adapter.layers[path].weight_shape for e in blend.active if path in e.adapter.layers)


def tensors_of(folder: Path, component: str) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    for file in weight_files(folder, component):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                yield file, key, tuple(opened.get_slice(key).get_shape())


def copy_small_files(folder: Path, part: Path) -> None:
    """Configurations, tokenizers and shard indexes; weights are written afresh, the source's own card is not ours."""
    for source in sorted(folder.rglob("*")):
        relative = source.relative_to(folder)
        if source.suffix in (".json", ".txt", ".model") and not any(p.startswith(".") for p in relative.parts):
            if relative.name == RECIPE_FILE or len(relative.parts) > 2:
                continue
            (part / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, part / relative)


def merge_file(
    source: Path,
    target: Path,
    places: Mapping[tuple[Path, str], str],
    blend: Blend,
    recipe: Recipe,
    lost: Losses,
) -> None:
    """One weight file with the blend in it; holds one tensor at a time."""
    with safe_open(source, framework="pt") as opened:
        metadata = {**(opened.metadata() or {}), "lora_diffusion_recipe": recipe.model_dump_json()}
        kinds: dict[str, TensorKind] = {}
        for key in opened.keys():  # noqa: SIM118 (not a mapping)
            tensor = opened.get_tensor(key)
            kinds[key] = (output_dtype(tensor.dtype, recipe.precision), tuple(tensor.shape))
        bar = tqdm(total=len(kinds), desc=f"merge {source.parent.name}", unit="tensor", leave=False)

        def merged(key: str) -> Tensor:
            bar.update()
            weight = opened.get_tensor(key)
            path = places.get((source, key))
            if path is None:
                return weight.to(kinds[key][0])
            return merged_weight(weight, kinds[key][0], blend, path, lost)

        with target.open("wb") as file, bar:
            stream_safetensors(file, kinds, metadata, merged)


def merged_weight(weight: Tensor, dtype: torch.dtype, blend: Blend, path: str, lost: Losses) -> Tensor:
    exact = blended_weight(weight.float(), blend, path)
    rounded = exact.to(dtype)
    lost.error += float((rounded.float() - exact).double().square().sum())
    lost.delta += float(blend_delta(blend, path).double().square().sum())
    return rounded


def output_dtype(dtype: torch.dtype, wanted: str) -> torch.dtype:
    """The type to write a tensor in; integers, such as position ids, stay as they are."""
    return DTYPES[wanted] if wanted in DTYPES and dtype.is_floating_point else dtype


def card(recipe: Recipe, swallowed: float) -> str:
    """A README for the merged checkpoint."""
    rows = "\n".join(f"| {e.name or e.path} | {e.weight:g} | `{e.hash[:16]}` |" for e in recipe.adapters)
    return (
        f"# {recipe.base} with {len(recipe.adapters)} adapter(s) merged in\n\n"
        f"| adapter | weight | hash |\n|---|---|---|\n{rows}\n\n"
        f"Base: {recipe.base} (`{recipe.base_hash[:16]}`). Rounding to the stored precision swallowed "
        f"{swallowed:.2%} of the blend's delta. The recipe is in `{RECIPE_FILE}`. Merged by lora_diffusion.\n"
    )
