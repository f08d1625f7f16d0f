"""Read, write and compare merge recipes, which are stored in the header of each merged weight file."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm, BlendEntry
from lora_diffusion.config.settings import Settings, format_validation_error
from lora_diffusion.core.dtypes import tensor_bytes
from lora_diffusion.core.templates import render_template
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.formats.checkpoints.diffusers import read_base_header, weight_files
from lora_diffusion.prompts.tags import format_weight

RECIPE_FILE = "lora_diffusion_recipe.json"
"""Name of the recipe file in a merged folder."""
RECIPE_KEY = "lora_diffusion_recipe"
"""Key of the recipe in the metadata of a safetensors header."""
_BLANK_HASH = "0" * 64
"""Placeholder, as long as a hash, for one that is computed while the weights are written."""


class MergeRecipe(Settings):
    """Everything needed to reproduce a merged checkpoint byte for byte, and to undo the merge."""

    kind: Literal["merge"] = "merge"
    """Marks the JSON as the recipe of a merge."""
    base: str
    """Checkpoint that was merged into: `tiny-sd`, a folder, a single file or a hub id."""
    base_hash: str = _BLANK_HASH
    """Content hash of the base."""
    adapters: tuple[BlendEntry, ...] = ()
    """Adapters with paths, hashes and weights."""
    bases: tuple[BaseTerm, ...] = ()
    """Differences of checkpoints that were added, with hashes and weights."""
    config: MergeConfig = MergeConfig()
    """Output type, shard size and rounding."""
    like: str = ""
    """Folder whose tokenizer and configuration were copied for a single-file base; empty if none was needed."""
    touched_hash: str = _BLANK_HASH
    """Hash of the base's values of all changed parameters; see the function `touched_hash`."""
    touched_types: tuple[str, ...] = ()
    """Types of the changed parameters in the base, sorted."""


def touched_hash(base: Checkpoint, names: Iterable[str]) -> str:
    """Hash parameters by name, type, shape and values.

    The hashes of the parameters are added modulo 2**256, so the result depends neither on their order nor on the layout
    of the files.

    Args:
        base: Checkpoint to read the parameters from.
        names: Parameter names.

    Returns:
        64 hexadecimal digits.
    """
    hash_sum = 0
    for name in names:
        stored = base.parameters[name]
        digest = hashlib.sha256(f"{name}|{stored.kind[0]}|{stored.kind[1]}|".encode())
        digest.update(tensor_bytes(stored.read()))
        hash_sum = (hash_sum + int.from_bytes(digest.digest(), "little")) % 2**256
    return f"{hash_sum:064x}"


def find_merge_recipe(path: str | os.PathLike[str]) -> MergeRecipe | None:
    """Read the recipe of a merged checkpoint.

    Args:
        path: Folder or single file.

    Returns:
        The recipe, or None if the checkpoint has none.

    Raises:
        ConfigError: If the recipe is invalid.
        BaseModelError: If a weight file cannot be read.
    """
    path = Path(path)
    file = path if path.is_file() else weight_files(path, "unet")[0]
    text = read_base_header(file).metadata.get(RECIPE_KEY)
    if text is None:
        return None
    try:
        return MergeRecipe.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: its recipe is invalid: {format_validation_error(error, MergeRecipe)}") from None


def read_merge_recipe(path: str | os.PathLike[str]) -> MergeRecipe:
    """Read the recipe of a checkpoint that must have one.

    Args:
        path: Folder or single file.

    Raises:
        ConfigError: If the path does not exist, or the checkpoint has no valid recipe.
        BaseModelError: If a weight file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; give a checkpoint written by `lora-diffusion merge`")
    recipe = find_merge_recipe(path)
    if recipe is None:
        raise ConfigError(f"{path}: carries no recipe; give a checkpoint written by `lora-diffusion merge`")
    return recipe


def is_same_merge(first: MergeRecipe, second: MergeRecipe) -> bool:
    """Return whether two recipes merge the same adapters and checkpoints with the same weights."""
    return _list_merged(first) == _list_merged(second)


def _list_merged(recipe: MergeRecipe) -> list[str]:
    adapters = [f"{entry.hash} {format_weight(entry.weight)}" for entry in recipe.adapters]
    return sorted([*adapters, *(f"{term.added_hash} {term.taken_hash} {term.weight}" for term in recipe.bases)])


def format_model_card(recipe: MergeRecipe, rounding_error: float) -> str:
    """Format the README of a merged checkpoint in Markdown.

    Args:
        recipe: Recipe of the merge, with hashes.
        rounding_error: Rounding error of the merge, relative to the merged delta.
    """
    rows = [(e.name or e.path, format_weight(e.weight), e.hash[:16]) for e in recipe.adapters]
    rows += [
        (f"{term.added} minus {term.taken or recipe.base}", f"{term.weight:g}", term.added_hash[:16])
        for term in recipe.bases
    ]
    return render_template(
        "lora_diffusion.merging",
        "model_card.md.j2",
        recipe=recipe,
        rows=rows,
        rounding_error=f"{rounding_error:.2%}",
        recipe_file=RECIPE_FILE,
    )


def recipe_json(recipe: MergeRecipe) -> str:
    """Format a recipe as the JSON text that is stored in headers."""
    return json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
