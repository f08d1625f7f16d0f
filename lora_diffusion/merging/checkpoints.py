"""Merge adapters and other checkpoints into a base: tensor by tensor, in float32, rounded once."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from lora_diffusion.algebra.combine import united_words
from lora_diffusion.anatomy import changeable_paths
from lora_diffusion.blend import Blend, blend_sum, check_fits, same_weight
from lora_diffusion.config import MergeConfig
from lora_diffusion.errors import AdapterFormatError, BaseModelError, ConfigError, FamilyMismatchError, OutputError
from lora_diffusion.files import whole_file, whole_folder
from lora_diffusion.formats.checkpoint import Checkpoint
from lora_diffusion.formats.safetensors_file import stream_safetensors
from lora_diffusion.merging.outputs import OutputFile, OutputPlan, OutputTensor, output_plan
from lora_diffusion.merging.recipe import (
    RECIPE_FILE,
    RECIPE_KEY,
    MergeRecipe,
    card,
    find_merge_recipe,
    recipe_json,
    same_merge,
    touched_hash,
)
from lora_diffusion.merging.values import BaseChange, Merged
from lora_diffusion.merging.words import add_to_folder, save_beside, word_rows
from lora_diffusion.models import find_base, find_checkpoint
from lora_diffusion.preset import BaseTerm
from lora_diffusion.recipe import blend_entries


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged, and what the output's precision cost."""

    output: Path
    merged_modules: int
    rounding_error: float
    """Norm of what rounding changed over norm of what was merged in."""
    num_bytes: int
    """Of the weights that were written."""
    words: tuple[Path, ...] = ()
    """Files of learned words beside a single file."""


def merge(
    base: str,
    blend: Blend,
    output: Path,
    config: MergeConfig | None = None,
    *,
    bases: Sequence[BaseTerm] = (),
    like: Path | None = None,
    force: bool = False,
) -> MergeReport:
    """Write a base with a blend, and other checkpoints, in its weights: a single file if `output` ends in
    `.safetensors`, else a folder in diffusers' layout.

    `base` is `tiny-sd`, a folder, a single file or a hub id; `bases` are checkpoints to be blended in; `like` is a
    folder of the same family that lends tokenizer and configuration when a single file becomes a folder. A base that
    carries this very merge already, and an output that is there, are refused unless `force`.

    Raises ConfigError if there is nothing to merge, BaseModelError, FamilyMismatchError if anything finds no tensor,
    OutputError if `output` cannot be written; in each case nothing is left behind.
    """
    config = config or MergeConfig()
    source = find_checkpoint(base)
    changes, terms = loaded_terms(source, bases)
    total, words = blend_sum(blend, source.anatomy), united_words(blend)
    if not (total.names or changes or words):
        raise ConfigError("nothing to merge; give at least one adapter with a weight other than 0")
    paths = frozenset(changeable_paths(source.anatomy))
    check_fits(blend, base_name=base, family=source.family.name, paths=paths, shapes=source.shapes)
    single = output.suffix == ".safetensors"
    appended = {} if single else word_rows(words, source)
    merged = Merged(total=total, bases=changes, config=config, appended=appended)
    touched = frozenset(source.parameters if changes else total.names)
    recipe = MergeRecipe(
        base=base,
        base_hash=source.hash,
        adapters=blend_entries(blend),
        bases=terms,
        config=config,
        like=str(like or ""),
        touched_hash=touched_hash(source, touched),
        touched_types=tuple(sorted({source.parameters[name].kind[0] for name in touched})),
    )
    if output.resolve() == source.path.resolve():
        raise OutputError(f"{output}: is the base itself; give another output")
    if not force:
        refuse_twice(source, output, recipe)
    plan = output_plan(
        source,
        single=single,
        like=find_base(str(like)) if like else None,
        precision=config.precision,
        shard_bytes=round(config.shard_gb * 1e9) if config.shard_gb else None,
    )
    plan = replace(plan, files=tuple(with_rows(file, appended) for file in plan.files))
    refuse_full_disk(output, plan)
    with written(output, plan, merged, recipe) as part:
        if not single:
            (part / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (part / "README.md").write_text(card(recipe, merged.rounding_error), encoding="utf-8")
            add_to_folder(part, words, source)
    return MergeReport(
        output=output,
        merged_modules=len(total.layers),
        rounding_error=merged.rounding_error,
        num_bytes=plan.num_bytes,
        words=tuple(save_beside(output, words, source.family.name)) if single else (),
    )


def loaded_terms(source: Checkpoint, bases: Sequence[BaseTerm]) -> tuple[tuple[BaseChange, ...], tuple[BaseTerm, ...]]:
    """The checkpoints to be blended in, and the terms with their hashes.

    Raises FamilyMismatchError for one of another family or shape, ConfigError if one is not what a recipe says.
    """
    changes: list[BaseChange] = []
    known: list[BaseTerm] = []
    for term in bases:
        added = other_checkpoint(source, term.added, term.added_hash)
        taken = other_checkpoint(source, term.taken, term.taken_hash) if term.taken else None
        changes.append(BaseChange(weight=term.weight, added=added, taken=taken))
        hashes = {"added_hash": added.hash, "taken_hash": taken.hash if taken else ""}
        known.append(term.model_copy(update=hashes))
    return tuple(changes), tuple(known)


def other_checkpoint(source: Checkpoint, name: str, known_hash: str) -> Checkpoint:
    """A checkpoint with every parameter of the base."""
    other = find_checkpoint(name)
    if known_hash and other.hash != known_hash:
        raise ConfigError(f"{name}: its hash {other.hash[:12]} is not that of the recipe ({known_hash[:12]})")
    if other.family is not source.family:
        raise FamilyMismatchError(f"{name} is {other.family.title}, but {source.path} is {source.family.title}")
    for parameter, stored in source.parameters.items():
        shape = other.shapes.get(parameter)
        if shape is None or not same_weight(shape, stored.kind[1]):
            raise FamilyMismatchError(
                f"{name}: {parameter} is {shape or 'missing'}, but {source.path} has {stored.kind[1]}; they cannot be "
                "blended"
            )
    return other


def refuse_twice(source: Checkpoint, output: Path, recipe: MergeRecipe) -> None:
    """Raise ConfigError for a base that has the merge in it already, OutputError for an output that is there."""
    found = find_merge_recipe(source.path)
    if found and same_merge(found, recipe):
        raise ConfigError(
            f"{source.path}: has this very merge in it already; merging twice doubles the weights, --force does it"
        )
    if output.suffix == ".safetensors" and output.is_file():
        raise OutputError(f"{output}: already there; give another output, or --force to replace it")


def with_rows(file: OutputFile, appended: Mapping[str, Tensor]) -> OutputFile:
    """The file with room for the rows that are put below some of its tensors."""

    def grown(tensor: OutputTensor) -> OutputTensor:
        more = sum(appended[part.name].shape[0] for part in tensor.parts if part.name in appended)
        dtype, shape = tensor.kind
        return replace(tensor, kind=(dtype, (shape[0] + more, *shape[1:]))) if more else tensor

    return replace(file, tensors={key: grown(tensor) for key, tensor in file.tensors.items()})


def refuse_full_disk(output: Path, plan: OutputPlan) -> None:
    """Raise OutputError now if the weights do not fit on the disk."""
    folder = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < plan.num_bytes:
        raise OutputError(
            f"{output}: needs {plan.num_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; "
            "make room or give another output"
        )


@contextmanager
def written(output: Path, plan: OutputPlan, merged: Merged, recipe: MergeRecipe | None) -> Iterator[Path]:
    """A temporary file or folder with everything that is planned; it becomes the output if the block ends well.

    Raises OutputError, BaseModelError if the base is cut short, ConfigError for values beyond the type's range.
    """
    single = not plan.files[0].name
    try:
        with (whole_file if single else whole_folder)(output) as part:
            for name, source in plan.copies.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, part / name)
            for file in plan.files:
                write_weights(part / file.name if file.name else part, file, merged, recipe)
            for name, text in plan.texts.items():
                (part / name).write_text(text, encoding="utf-8")
            yield part
    except (AdapterFormatError, FileNotFoundError) as error:
        raise BaseModelError(f"the base cannot be read in full ({error}); it is damaged") from None


def write_weights(path: Path, file: OutputFile, merged: Merged, recipe: MergeRecipe | None) -> None:
    """One weight file; holds one tensor at a time."""
    kinds = {key: tensor.kind for key, tensor in file.tensors.items()}
    metadata = {key: text for key, text in file.metadata.items() if key != RECIPE_KEY}
    metadata |= {RECIPE_KEY: recipe_json(recipe)} if recipe else {}
    with path.open("wb") as opened, tqdm(total=len(kinds), desc="merge", unit="tensor", leave=False) as bar:

        def value(key: str) -> Tensor:
            bar.update()
            return merged.value(file.tensors[key])

        stream_safetensors(opened, kinds, metadata, value)
