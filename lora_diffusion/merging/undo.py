"""Taking a merge out of a checkpoint again: bit for bit, or not at all."""

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


def find_original_base(recipe: MergeRecipe, name: str = "") -> Checkpoint | None:
    """The base that the recipe names, or that is given instead, if it is there and is the very one."""
    try:
        found = find_checkpoint(name or recipe.base)
    except BaseModelError:
        if name:
            raise
        return None
    return found if found.hash == recipe.base_hash else None


def copy_base(base: Checkpoint, output: Path) -> None:
    """The base as it is. Raises OutputError."""
    check_output_free(output)
    if not base.is_folder:
        with atomic_file(output) as part:
            shutil.copyfile(base.path, part)
        return
    with atomic_folder(output) as part:
        shutil.copytree(base.path, part, dirs_exist_ok=True)


def check_output_free(output: Path) -> None:
    """Raise OutputError for a file that is there."""
    if output.is_file():
        raise OutputError(f"{output}: already there; give another output")


def subtract_blend(merged: Path, recipe: MergeRecipe, blend: Blend, output: Path) -> None:
    """Subtract the blend again, and keep the result only if every changed weight is the base's own, bit for bit.

    That is so where the merged file is of a wider type than the base, as float32 is than float16. Raises ConfigError
    where it is not, or where subtracting cannot undo what was merged.
    """
    check_output_free(output)
    reason = explain_not_subtractable(recipe, blend)
    source = open_checkpoint(merged)
    if reason:
        raise ConfigError(f"{merged}: {reason}; give the base (hash {recipe.base_hash[:12]}) with --base")
    config = MergeConfig(precision=recipe.touched_types[0])  # type: ignore[arg-type]
    total = blend_sum(blend, source.layout)
    plan = plan_output(source, single=not source.is_folder, like=None, config=config)
    with write_checkpoint(output, plan, MergedTensors(total=negate(total), bases=(), config=config), None) as part:
        if touched_hash(open_checkpoint(part), total.names) != recipe.touched_hash:
            raise ConfigError(
                f"{merged}: rounding has taken bits that subtracting does not give back; give the base "
                f"(hash {recipe.base_hash[:12]}) with --base"
            )


def explain_not_subtractable(recipe: MergeRecipe, blend: Blend) -> str:
    """Why the adapters alone cannot take the merge out; empty if they can be tried."""
    if recipe.bases:
        return "other checkpoints were blended in, which is not taken out without the base"
    if any(entry.adapter.tokens for entry in blend.active):
        return "learned words were added to it, which are not taken out without the base"
    if any(layer.kind == "DoRA" for entry in blend.active for layer in entry.adapter.layers.values()):
        return "DoRA is no sum, and is not taken out without the base"
    return "" if len(recipe.touched_types) == 1 else "the base had weights of several types"


def negate(total: BlendSum) -> BlendSum:
    """The sum with every coefficient's sign turned."""
    return BlendSum(
        layers={path: tuple((-weight, layer) for weight, layer in terms) for path, terms in total.layers.items()},
        biases={path: tuple((-weight, bias) for weight, bias in terms) for path, terms in total.biases.items()},
    )
