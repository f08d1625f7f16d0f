"""Merge adapters and other checkpoints into a base: tensor by tensor, in float32, rounded once."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.adapters.blend import Blend, blend_sum
from lora_diffusion.adapters.compatibility import is_same_weight
from lora_diffusion.algebra.combine.exact_sum import merge_tokens
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm
from lora_diffusion.errors import ConfigError, FamilyMismatchError, OutputError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.library.recipe import blend_entries
from lora_diffusion.merging.layout import plan_output
from lora_diffusion.merging.recipe import (
    RECIPE_FILE,
    MergeRecipe,
    find_merge_recipe,
    format_model_card,
    is_same_merge,
    touched_hash,
)
from lora_diffusion.merging.tensors import BaseChange, MergedTensors
from lora_diffusion.merging.textual_inversion import add_to_folder, embedding_rows, save_beside
from lora_diffusion.merging.writer import OnShare, check_disk_space, patch_header_hashes, with_rows, write_checkpoint
from lora_diffusion.models.locate import check_fits_checkpoint, find_base, find_checkpoint

PROBED = 24
"""So many tensors tell what rounding will take."""


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


def merge(  # noqa: PLR0913 (what a merge may be told)
    base: str,
    blend: Blend,
    output: Path,
    config: MergeConfig | None = None,
    *,
    bases: Sequence[BaseTerm] = (),
    like: Path | None = None,
    force: bool = False,
    on_share: OnShare | None = None,
) -> MergeReport:
    """Write a base with a blend, and other checkpoints, in its weights: a single file if `output` ends in
    `.safetensors`, else a folder in diffusers' layout.

    `base` is `tiny-sd`, a folder, a single file or a hub id; `bases` are checkpoints to be blended in; `like` is a
    folder of the same family that lends tokenizer and configuration when a single file becomes a folder. A base that
    carries this very merge already, and an output that is there, are refused unless `force`. `on_share` is told how far
    the writing is.

    Raises ConfigError if there is nothing to merge, BaseModelError, FamilyMismatchError if anything finds no tensor,
    OutputError if `output` cannot be written; in each case nothing is left behind.
    """
    config, single = config or MergeConfig(), output.suffix == ".safetensors"
    source = find_checkpoint(base)
    changes, terms = open_terms(source, bases)
    merged = make_merged_tensors(source, blend, changes, config, base_name=base, rows=not single)
    words = merge_tokens(blend)
    if not (merged.total.names or changes or words):
        raise ConfigError("nothing to merge; give at least one adapter with a weight other than 0")
    touched = frozenset(source.parameters if changes else merged.total.names)
    recipe = MergeRecipe(
        base=base,
        adapters=blend_entries(blend),
        bases=terms,
        config=config,
        like=str(like or ""),
        touched_types=tuple(sorted({source.parameters[name].kind[0] for name in touched})),
    )
    if output.resolve() == source.path.resolve():
        raise OutputError(f"{output}: is the base itself; give another output")
    if not force:
        check_not_merged_twice(source, output, recipe)
    lender = find_base(str(like)) if like else None
    plan = with_rows(plan_output(source, single=single, like=lender, config=config), merged.appended)
    check_disk_space(output, plan)
    with ThreadPoolExecutor(1) as reader:
        hashes = reader.submit(
            compute_recipe_hashes, source, touched
        )  # the base is read for them while it is being merged
        with write_checkpoint(output, plan, merged, recipe, on_share) as part:
            recipe = patch_header_hashes(part, plan, recipe, hashes.result())
            if not single:
                (part / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
                (part / "README.md").write_text(format_model_card(recipe, merged.rounding_error), encoding="utf-8")
                add_to_folder(part, words, source)
    return MergeReport(
        output=output,
        merged_modules=len(merged.total.layers),
        rounding_error=merged.rounding_error,
        num_bytes=plan.num_bytes,
        words=tuple(save_beside(output, words, source.family.name)) if single else (),
    )


def estimate_rounding(base: str, blend: Blend, config: MergeConfig) -> float:
    """The rounding error that a merge into a folder would report, from a few of its tensors; nothing is written.

    Raises FamilyMismatchError if a layer finds no tensor.
    """
    source = find_checkpoint(base)
    merged = make_merged_tensors(source, blend, (), config, base_name=base, rows=False)
    plan = plan_output(source, single=False, like=None, config=config)
    tensors = [tensor for file in plan.files for tensor in file.tensors.values()]
    touched = [tensor for tensor in tensors if any(part.name in merged.total.names for part in tensor.parts)]
    for tensor in touched[:: max(1, len(touched) // PROBED)]:
        merged.value(tensor)
    return merged.rounding_error


def make_merged_tensors(
    source: Checkpoint,
    blend: Blend,
    changes: tuple[BaseChange, ...],
    config: MergeConfig,
    *,
    base_name: str,
    rows: bool,
) -> MergedTensors:
    """What the tensors of a base become; with `rows`, learned words go into its embeddings.

    Raises FamilyMismatchError if a layer finds no tensor.
    """
    check_fits_checkpoint(blend, source, base_name)
    appended = embedding_rows(merge_tokens(blend), source) if rows else {}
    return MergedTensors(total=blend_sum(blend, source.layout), bases=changes, config=config, appended=appended)


def open_terms(source: Checkpoint, bases: Sequence[BaseTerm]) -> tuple[tuple[BaseChange, ...], tuple[BaseTerm, ...]]:
    """The checkpoints to be blended in, and the terms with their hashes.

    Raises FamilyMismatchError for one of another family or shape, ConfigError if one is not what a recipe says.
    """
    changes: list[BaseChange] = []
    known: list[BaseTerm] = []
    for term in bases:
        added = open_matching(source, term.added, term.added_hash)
        taken = open_matching(source, term.taken, term.taken_hash) if term.taken else None
        changes.append(BaseChange(weight=term.weight, added=added, taken=taken))
        hashes = {"added_hash": added.hash, "taken_hash": taken.hash if taken else ""}
        known.append(term.model_copy(update=hashes))
    return tuple(changes), tuple(known)


def open_matching(source: Checkpoint, name: str, known_hash: str) -> Checkpoint:
    """A checkpoint with every parameter of the base."""
    other = find_checkpoint(name)
    if known_hash and other.hash != known_hash:
        raise ConfigError(f"{name}: its hash {other.hash[:12]} is not that of the recipe ({known_hash[:12]})")
    if other.family is not source.family:
        raise FamilyMismatchError(f"{name} is {other.family.title}, but {source.path} is {source.family.title}")
    for parameter, stored in source.parameters.items():
        shape = other.shapes.get(parameter)
        if shape is None or not is_same_weight(shape, stored.kind[1]):
            raise FamilyMismatchError(
                f"{name}: {parameter} is {shape or 'missing'}, but {source.path} has {stored.kind[1]}; they cannot be "
                "blended"
            )
    return other


def compute_recipe_hashes(base: Checkpoint, touched: Iterable[str]) -> dict[str, str]:
    """What a recipe tells a base by: all of it, and the parameters that the merge changes."""
    return {"base_hash": base.hash, "touched_hash": touched_hash(base, touched)}


def check_not_merged_twice(source: Checkpoint, output: Path, recipe: MergeRecipe) -> None:
    """Raise ConfigError for a base that has the merge in it already, OutputError for an output that is there."""
    found = find_merge_recipe(source.path)
    if found and is_same_merge(found, recipe):
        raise ConfigError(
            f"{source.path}: has this very merge in it already; merging twice doubles the weights, --force does it"
        )
    if output.suffix == ".safetensors" and output.is_file():
        raise OutputError(f"{output}: already there; give another output, or --force to replace it")
