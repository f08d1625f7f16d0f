"""Undo a merge: copy the original base, or subtract the adapters if that restores the base bit for bit."""

import os
import shutil
from pathlib import Path

from lora_diffusion.adapters.blend import Blend, BlendSum, blend_sum
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.core.atomic_files import atomic_file, atomic_folder
from lora_diffusion.errors import BaseModelError, ConfigError, OutputError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lora_diffusion.merging.layout import plan_output
from lora_diffusion.merging.recipe import MergeRecipe, touched_hash
from lora_diffusion.merging.tensors import MergedTensors
from lora_diffusion.merging.writer import write_checkpoint
from lora_diffusion.models.locate import find_checkpoint


def find_original_base(recipe: MergeRecipe, name: str | os.PathLike[str] = "") -> Checkpoint | None:
    """Find the checkpoint that a merge was made from.

    Args:
        recipe: Recipe of the merge.
        name: Checkpoint to use instead of the one that the recipe names.

    Returns:
        The checkpoint, or None if its hash differs from the recipe's, or if the recipe's checkpoint cannot be found.

    Raises:
        BaseModelError: If `name` cannot be found.
    """
    try:
        checkpoint = find_checkpoint(name or recipe.base)
    except BaseModelError:
        if name:
            raise
        return None
    return checkpoint if checkpoint.hash == recipe.base_hash else None


def copy_base(base: Checkpoint, output: str | os.PathLike[str]) -> None:
    """Copy a checkpoint unchanged.

    Args:
        base: Folder or single file.
        output: Where to write the copy.

    Raises:
        OutputError: If the output exists or cannot be written.
    """
    output = Path(output)
    _check_no_file(output)
    if not base.is_folder:
        with atomic_file(output) as part:
            shutil.copyfile(base.path, part)
        return
    with atomic_folder(output) as part:
        shutil.copytree(base.path, part, dirs_exist_ok=True)


def _check_no_file(output: Path) -> None:
    """Refuse to overwrite a file; `atomic_folder` refuses folders. The command has no --force."""
    if output.is_file():
        raise OutputError(f"{output}: already exists; choose another output")


def subtract_blend(
    merged: str | os.PathLike[str], recipe: MergeRecipe, blend: Blend, output: str | os.PathLike[str]
) -> None:
    """Subtract a blend from a merged checkpoint and write the result if it equals the original base bit for bit.

    This succeeds if the merged file has a wider type than the base, such as float32 for a float16 base.

    Args:
        merged: Merged checkpoint.
        recipe: Its recipe.
        blend: The adapters that were merged, with their weights.
        output: Folder or file to write, in the layout of `merged`.

    Raises:
        ConfigError: If the merge cannot be undone by subtraction, or rounding has made the result inexact.
        OutputError: If the output exists or cannot be written.
        BaseModelError: If the merged checkpoint cannot be read.
    """
    output = Path(output)
    _check_no_file(output)
    obstacle = _explain_not_subtractable(recipe, blend)
    source = open_checkpoint(merged)
    use_base = f"give the original base (hash {recipe.base_hash[:12]}) with --base"
    if obstacle:
        raise ConfigError(f"{merged}: cannot be undone by subtraction: {obstacle}; {use_base}")
    config = MergeConfig(precision=recipe.touched_types[0])  # type: ignore[arg-type]
    deltas = blend_sum(blend, source.layout)
    plan = plan_output(source, single=not source.is_folder, like=None, config=config)
    tensors = MergedTensors(deltas=_negate(deltas), bases=(), config=config)
    with write_checkpoint(output, plan, tensors, None) as part:
        if touched_hash(open_checkpoint(part), deltas.names) != recipe.touched_hash:
            raise ConfigError(
                f"{merged}: subtracting the adapters does not restore the original weights exactly, because the merge "
                f"has rounded them; {use_base}"
            )


def _explain_not_subtractable(recipe: MergeRecipe, blend: Blend) -> str:
    """Explain why a merge cannot be undone by subtraction; empty if it may be possible."""
    if recipe.bases:
        return "other checkpoints were merged as well"
    if any(entry.adapter.tokens for entry in blend.active):
        return "textual-inversion embeddings were added"
    if any(layer.kind == "DoRA" for entry in blend.active for layer in entry.adapter.layers.values()):
        return "DoRA rescales the base's weights instead of adding to them"
    return "" if len(recipe.touched_types) == 1 else "the base has weights of several types"


def _negate(deltas: BlendSum) -> BlendSum:
    """Reverse the sign of each coefficient."""
    return BlendSum(
        layers={
            path: tuple((-coefficient, layer) for coefficient, layer in terms) for path, terms in deltas.layers.items()
        },
        biases={
            path: tuple((-coefficient, bias) for coefficient, bias in terms) for path, terms in deltas.biases.items()
        },
    )
