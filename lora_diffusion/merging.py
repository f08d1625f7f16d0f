"""Merge a blend into a checkpoint folder: tensor by tensor, in float32, rounded once."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from lora_diffusion.anatomy import changeable_paths
from lora_diffusion.blend import (
    Blend,
    BlendSum,
    blend_sum,
    blended_bias,
    blended_weight,
    check_fits,
    rounded,
    wanted_shapes,
)
from lora_diffusion.config import WeightType
from lora_diffusion.errors import BaseModelError, ConfigError
from lora_diffusion.files import whole_folder
from lora_diffusion.formats.diffusers_folder import (
    anatomy_of_folder,
    base_hash,
    components_of,
    find_parameters,
    stored_kinds,
    text_encoder_names,
    weight_files,
)
from lora_diffusion.formats.safetensors_file import TensorKind, stream_safetensors
from lora_diffusion.models import find_base
from lora_diffusion.precision import FLOAT_TYPES, torch_dtype
from lora_diffusion.recipe import Recipe, blend_entries, library_versions
from lora_diffusion.tags import weight_text

RECIPE_FILE = "lora_diffusion_recipe.json"
Places = Mapping[tuple[Path, str], str]
"""(file, tensor name) -> parameter, `<module path>.weight` or `.bias`."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and what the output's precision cost."""

    output: Path
    merged_modules: int
    rounding_error: float
    """Norm of what rounding changed over norm of the blend's delta."""


def merge(base: str, blend: Blend, output: Path, *, dtype: WeightType = "keep") -> MergeReport:
    """Write the base (`tiny-sd`, a folder or a hub id) with the blend in its weights to the folder `output`.

    Raises ConfigError if there is nothing to merge, BaseModelError, FamilyMismatchError if any layer finds no tensor,
    OutputError if `output` cannot be written; in each case nothing is left behind.
    """
    worded = next((entry for entry in blend.active if entry.adapter.tokens), None)
    if worded:
        raise ConfigError(
            f"{worded.name} holds learned words ({', '.join(worded.adapter.tokens)}), which no checkpoint can; "
            "`lora-diffusion convert --without-tokens` makes a file of its layers alone"
        )
    folder = find_base(base)
    family, anatomy = anatomy_of_folder(folder)
    total = blend_sum(blend, anatomy)
    if not total.names:
        raise ConfigError("nothing to merge; give at least one adapter with a weight other than 0")
    stored = find_parameters(folder, {name for entry in blend.entries for name in wanted_shapes(entry.adapter)})
    shapes = {name: place.shape for name, place in stored.items()}
    check_fits(blend, base_name=base, family=family.name, paths=frozenset(changeable_paths(anatomy)), shapes=shapes)
    places = {(place.file, place.key): name for name, place in stored.items() if name in total.names}
    recipe = Recipe(
        kind="merge",
        base=base,
        base_hash=base_hash(folder),
        adapters=blend_entries(blend),
        precision=dtype,
        versions=library_versions(),
    )
    rounding = Rounding()
    try:
        with whole_folder(output) as part:
            write_checkpoint(folder, part, places, total, recipe, rounding)
    except (SafetensorError, FileNotFoundError) as error:
        raise BaseModelError(f"{folder}: cannot be read in full ({error}); the base is damaged") from None
    return MergeReport(output=output, merged_modules=len(total.layers), rounding_error=rounding.relative)


@dataclass
class Rounding:
    """Running sums of squared rounding error and squared delta."""

    error: float = 0.0
    delta: float = 0.0

    def add(self, base: Tensor, exact: Tensor, value: Tensor) -> None:
        """Take one tensor in: before the blend, after it in float32, and as it is stored."""
        self.error += float((value.float() - exact).double().square().sum())
        self.delta += float((exact - base.float()).double().square().sum())

    @property
    def relative(self) -> float:
        """Norm of the error over norm of the delta."""
        return (self.error / self.delta) ** 0.5 if self.delta else 0.0


def write_checkpoint(
    folder: Path, part: Path, places: Places, total: BlendSum, recipe: Recipe, rounding: Rounding
) -> None:
    """The whole pipeline into `part`: merged components written afresh, the others copied."""
    shutil.copyfile(folder / "model_index.json", part / "model_index.json")
    rewritten = ("unet", *text_encoder_names(folder), "vae")
    for component in components_of(folder):
        if component not in rewritten:
            shutil.copytree(folder / component, part / component)
            continue
        (part / component).mkdir()
        for source in sorted((folder / component).glob("*.json")):
            shutil.copyfile(source, part / component / source.name)
        for source in weight_files(folder, component):
            write_merged(source, part / component / source.name, places, total, recipe, rounding)
    (part / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (part / "README.md").write_text(card(recipe, rounding.relative), encoding="utf-8")


def write_merged(
    source: Path, target: Path, places: Places, total: BlendSum, recipe: Recipe, rounding: Rounding
) -> None:
    """One weight file with the blend in it; holds one tensor at a time."""
    kinds: dict[str, TensorKind] = {
        key: (output_dtype(dtype, recipe.precision), shape) for key, (dtype, shape) in stored_kinds(source).items()
    }
    with safe_open(source, framework="pt") as opened:
        metadata = {**(opened.metadata() or {}), "lora_diffusion_recipe": recipe.model_dump_json()}
        bar = tqdm(total=len(kinds), desc=f"merge {source.parent.name}", unit="tensor", leave=False)

        def merged(key: str) -> Tensor:
            bar.update()
            tensor, name = opened.get_tensor(key), places.get((source, key))
            dtype = torch_dtype(kinds[key][0])
            if name is None:
                return tensor.to(dtype)
            path, _, leaf = name.rpartition(".")
            exact = (
                blended_weight(tensor, total.layers[path])
                if leaf == "weight"
                else blended_bias(tensor, total.biases[path])
            )
            value = rounded(exact, dtype, name)
            rounding.add(tensor, exact, value)
            return value

        with target.open("wb") as file, bar:
            stream_safetensors(file, kinds, metadata, merged)


def output_dtype(dtype: str, wanted: str) -> str:
    """The type to write a tensor in; integers, such as position ids, stay as they are."""
    return wanted if wanted in FLOAT_TYPES and "float" in dtype else dtype


def card(recipe: Recipe, rounding_error: float) -> str:
    """A README for the merged checkpoint."""
    rows = "\n".join(f"| {e.name or e.path} | {weight_text(e.weight)} | `{e.hash[:16]}` |" for e in recipe.adapters)
    return (
        f"# {recipe.base} with {len(recipe.adapters)} adapter(s) merged in\n\n"
        f"| adapter | weight | hash |\n|---|---|---|\n{rows}\n\n"
        f"Base: {recipe.base} (`{recipe.base_hash[:16]}`). Rounding to the stored precision changed the blend's delta "
        f"by {rounding_error:.2%}. The recipe is in `{RECIPE_FILE}`. Merged by lora_diffusion.\n"
    )
