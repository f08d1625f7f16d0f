"""Merge a blend of adapters, and other checkpoints, into the weights of a base checkpoint on disk.

Tensors are read, merged in float32, rounded once to the output's type and written one at a time.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.adapters.adapter import Token
from lora_diffusion.adapters.blend import Blend, blend_sum
from lora_diffusion.adapters.compatibility import is_same_weight
from lora_diffusion.algebra.combine.exact_sum import merge_tokens
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm
from lora_diffusion.core.atomic_files import check_output_free
from lora_diffusion.errors import ConfigError, FamilyMismatchError, OutputError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.library.recipe import blend_entries
from lora_diffusion.merging.layout import OutputPlan, plan_output
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
from lora_diffusion.merging.writer import (
    OnProgress,
    add_embedding_rows,
    check_disk_space,
    patch_header_hashes,
    write_checkpoint,
)
from lora_diffusion.models.locate import check_fits_checkpoint, find_base, find_checkpoint

_MAX_SAMPLED_TENSORS = 24
"""About how many of the changed tensors `estimate_rounding` computes."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Result of a merge."""

    output: Path
    """Folder or single file that was written."""
    merged_modules: int
    """Number of modules whose weights were changed by adapters."""
    rounding_error: float
    """Frobenius norm of the rounding errors divided by that of all changes."""
    num_bytes: int
    """Size of the written weights."""
    embedding_files: tuple[Path, ...] = ()
    """Textual-inversion files written beside a single-file checkpoint."""


def merge(  # noqa: PLR0913 (only the first three are required)
    base: str | os.PathLike[str],
    blend: Blend,
    output: str | os.PathLike[str],
    config: MergeConfig | None = None,
    *,
    bases: Sequence[BaseTerm] = (),
    like: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Write a checkpoint with a blend, and optionally other checkpoints, merged into its weights.

    If the merge fails, nothing is written.

    Args:
        base: Checkpoint to merge into: `tiny-sd`, a folder in diffusers' layout, a single file or a hub id.
        blend: Adapters to merge.
        output: Single file to write if it ends in `.safetensors`, otherwise a folder in diffusers' layout.
        config: Output type, shard size and rounding.
        bases: Weighted differences of checkpoints to add to the weights.
        like: Folder of the same family whose tokenizer and configuration are copied; required to write a single-file
            base as a folder.
        force: Overwrite an existing file, and merge even if the base contains the same merge already.
        on_progress: Callback with the fraction of tensors written so far.

    Raises:
        ConfigError: If there is nothing to merge, the base contains the same merge already, or a value exceeds the
            range of the output's type.
        BaseModelError: If a checkpoint cannot be found or read.
        FamilyMismatchError: If an adapter or checkpoint does not fit the base.
        OutputError: If the output exists, is the base itself, or cannot be written.
    """
    name, output, config = os.fspath(base), Path(output), config or MergeConfig()
    single, tokens = _is_single_file(output), merge_tokens(blend)
    source = find_checkpoint(base)
    changes, terms = _open_terms(source, bases)
    merged = _make_merged_tensors(source, blend, changes, config, base_name=name, append_embeddings=not single)
    if not (merged.deltas.names or changes or tokens):
        raise ConfigError("nothing to merge; give at least one adapter with a weight other than 0")
    recipe = MergeRecipe(
        base=name,
        adapters=blend_entries(blend),
        bases=terms,
        config=config,
        like=os.fspath(like or ""),
        touched_types=tuple(sorted({source.parameters[name].kind[0] for name in _changed_names(source, merged)})),
    )
    _check_not_merged(source, output, recipe, force=force)
    template = find_base(like) if like else None
    plan = add_embedding_rows(plan_output(source, single=single, like=template, config=config), merged.appended)
    _write_output(output, plan, merged, recipe, source, tokens, on_progress)
    return MergeReport(
        output=output,
        merged_modules=len(merged.deltas.layers),
        rounding_error=merged.rounding_error,
        num_bytes=plan.num_bytes,
        embedding_files=tuple(save_beside(output, tokens, source.family.name)) if single else (),
    )


def _is_single_file(output: Path) -> bool:
    """Return whether a merge writes a single file in the original layout rather than a diffusers folder."""
    return output.suffix == ".safetensors"


def _changed_names(source: Checkpoint, merged: MergedTensors) -> frozenset[str]:
    """Return the names of the parameters that a merge changes: all of them if checkpoints are merged."""
    return frozenset(source.parameters if merged.bases else merged.deltas.names)


def _write_output(
    output: Path,
    plan: OutputPlan,
    merged: MergedTensors,
    recipe: MergeRecipe,
    source: Checkpoint,
    tokens: Mapping[str, Token],
    on_progress: OnProgress | None,
) -> None:
    """Write a planned checkpoint; a folder also gets the recipe, a model card and the textual-inversion tokens."""
    check_disk_space(output, plan)
    with ThreadPoolExecutor(1) as executor:
        # Hashing reads the whole base, so it runs while the tensors are merged; the hashes are patched in afterwards.
        hashes = executor.submit(_compute_recipe_hashes, source, _changed_names(source, merged))
        with write_checkpoint(output, plan, merged, recipe, on_progress) as part:
            recipe = patch_header_hashes(part, plan, recipe, hashes.result())
            if not _is_single_file(output):
                (part / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
                (part / "README.md").write_text(format_model_card(recipe, merged.rounding_error), encoding="utf-8")
                add_to_folder(part, tokens, source)


def estimate_rounding(base: str | os.PathLike[str], blend: Blend, config: MergeConfig) -> float:
    """Estimate the rounding error of a merge into a folder from some of its tensors, without writing anything.

    Args:
        base: Checkpoint to merge into, as in `merge`.
        blend: Adapters to merge.
        config: Output type and rounding.

    Returns:
        Estimate of `MergeReport.rounding_error`.

    Raises:
        BaseModelError: If the base cannot be found or read.
        FamilyMismatchError: If an adapter does not fit the base.
    """
    source = find_checkpoint(base)
    merged = _make_merged_tensors(source, blend, (), config, base_name=os.fspath(base), append_embeddings=False)
    plan = plan_output(source, single=False, like=None, config=config)
    tensors = [tensor for file in plan.files for tensor in file.tensors.values()]
    changed = [tensor for tensor in tensors if any(part.name in merged.deltas.names for part in tensor.parts)]
    for tensor in changed[:: max(1, len(changed) // _MAX_SAMPLED_TENSORS)]:
        merged.value(tensor)
    return merged.rounding_error


def _make_merged_tensors(
    source: Checkpoint,
    blend: Blend,
    changes: tuple[BaseChange, ...],
    config: MergeConfig,
    *,
    base_name: str,
    append_embeddings: bool,
) -> MergedTensors:
    """Validate the blend and prepare the computation of the merged tensors.

    Args:
        source: Checkpoint to merge into.
        blend: Adapters to merge.
        changes: Other checkpoints to merge.
        config: Output type and rounding.
        base_name: Name of the checkpoint for error messages.
        append_embeddings: Append textual-inversion vectors to the token embeddings.

    Raises:
        FamilyMismatchError: If an adapter does not fit the base.
    """
    check_fits_checkpoint(blend, source, base_name)
    appended = embedding_rows(merge_tokens(blend), source) if append_embeddings else {}
    return MergedTensors(deltas=blend_sum(blend, source.layout), bases=changes, config=config, appended=appended)


def _open_terms(source: Checkpoint, bases: Sequence[BaseTerm]) -> tuple[tuple[BaseChange, ...], tuple[BaseTerm, ...]]:
    """Open the checkpoints to merge, and add their hashes to the terms for the recipe.

    Raises:
        FamilyMismatchError: If a checkpoint has another family, or a parameter of another shape.
        ConfigError: If a checkpoint differs from the hash in its term.
    """
    changes: list[BaseChange] = []
    terms_with_hashes: list[BaseTerm] = []
    for term in bases:
        added = _open_matching(source, term.added, term.added_hash)
        taken = _open_matching(source, term.taken, term.taken_hash) if term.taken else None
        changes.append(BaseChange(weight=term.weight, added=added, taken=taken))
        hashes = {"added_hash": added.hash, "taken_hash": taken.hash if taken else ""}
        terms_with_hashes.append(term.model_copy(update=hashes))
    return tuple(changes), tuple(terms_with_hashes)


def _open_matching(source: Checkpoint, name: str, expected_hash: str) -> Checkpoint:
    """Open a checkpoint that has every parameter of the base, in the same shape."""
    other = find_checkpoint(name)
    if expected_hash and other.hash != expected_hash:
        raise ConfigError(
            f"{name}: the recipe was made with another checkpoint (hash {expected_hash[:12]}, this one has "
            f"{other.hash[:12]}); give that one"
        )
    if other.family is not source.family:
        raise FamilyMismatchError(
            f"{name} is {other.family.title}, but {source.path} is {source.family.title}; merge checkpoints of one "
            "family"
        )
    for parameter, stored in source.parameters.items():
        shape = other.shapes.get(parameter)
        if shape is None or not is_same_weight(shape, stored.kind[1]):
            raise FamilyMismatchError(
                f"{name}: {parameter} {f'has the shape {shape}' if shape else 'is missing'}, but {source.path} has "
                f"{stored.kind[1]}; the checkpoints cannot be merged"
            )
    return other


def _compute_recipe_hashes(base: Checkpoint, changed_names: Iterable[str]) -> dict[str, str]:
    """Compute the recipe's hashes of the base: of the whole checkpoint and of the parameters that the merge changes."""
    return {"base_hash": base.hash, "touched_hash": touched_hash(base, changed_names)}


def _check_not_merged(source: Checkpoint, output: Path, recipe: MergeRecipe, *, force: bool) -> None:
    """Check that the output is not the base, and without `force` that the base does not contain the same merge.

    A folder that exists is refused when it is written, because `force` does not replace folders.
    """
    if output.resolve() == source.path.resolve():
        raise OutputError(f"{output}: is the base itself; choose another output")
    if force:
        return
    previous = find_merge_recipe(source.path)
    if previous and is_same_merge(previous, recipe):
        raise ConfigError(
            f"{source.path}: contains this very merge already, and merging again would double the weights; choose the "
            "original base, or merge again with --force"
        )
    if _is_single_file(output):
        check_output_free(output)
