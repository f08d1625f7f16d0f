"""The recipe of a merge, which is in every weight file that it wrote, and runs again."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm, BlendEntry
from lora_diffusion.config.settings import Settings, format_validation_error
from lora_diffusion.core.dtypes import tensor_bytes
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.formats.checkpoints.diffusers import read_base_header, weight_files
from lora_diffusion.prompts.tags import format_weight

RECIPE_FILE = "lora_diffusion_recipe.json"
RECIPE_KEY = "lora_diffusion_recipe"
BLANK = "0" * 64
"""In place of a hash that is not known yet."""


class MergeRecipe(Settings):
    """Everything needed to make a merged checkpoint again, byte for byte, and to take the merge out of it."""

    kind: Literal["merge"] = "merge"
    base: str
    base_hash: str = BLANK
    adapters: tuple[BlendEntry, ...] = ()
    bases: tuple[BaseTerm, ...] = ()
    config: MergeConfig = MergeConfig()
    like: str = ""
    """Folder that lent tokenizer and configuration to a single file."""
    touched_hash: str = BLANK
    """Over the base's own values of what was changed; see `touched_hash`."""
    touched_types: tuple[str, ...] = ()
    """Their types."""


def touched_hash(base: Checkpoint, names: Iterable[str]) -> str:
    """A hash of parameters by name and content, whatever their order and the files' layout."""
    total = 0
    for name in names:
        stored = base.parameters[name]
        digest = hashlib.sha256(f"{name}|{stored.kind[0]}|{stored.kind[1]}|".encode())
        digest.update(tensor_bytes(stored.read()))
        total = (total + int.from_bytes(digest.digest(), "little")) % 2**256
    return f"{total:064x}"


def find_merge_recipe(path: Path) -> MergeRecipe | None:
    """The recipe in a checkpoint, a folder or a single file; None if it carries none.

    Raises ConfigError for one that cannot be used, BaseModelError for a broken file.
    """
    file = path if path.is_file() else weight_files(path, "unet")[0]
    text = read_base_header(file).metadata.get(RECIPE_KEY)
    if text is None:
        return None
    try:
        return MergeRecipe.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: its recipe cannot be used: {format_validation_error(error, MergeRecipe)}") from None


def read_merge_recipe(path: Path) -> MergeRecipe:
    """The same. Raises ConfigError if there is none."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; give a checkpoint that `lora-diffusion merge` wrote")
    recipe = find_merge_recipe(path)
    if recipe is None:
        raise ConfigError(f"{path}: carries no recipe; give a checkpoint that `lora-diffusion merge` wrote")
    return recipe


def is_same_merge(first: MergeRecipe, second: MergeRecipe) -> bool:
    """Whether two recipes blend in the same adapters and checkpoints at the same weights."""
    return list_merged(first) == list_merged(second)


def list_merged(recipe: MergeRecipe) -> list[str]:
    adapters = [f"{entry.hash} {format_weight(entry.weight)}" for entry in recipe.adapters]
    return sorted([*adapters, *(f"{term.added_hash} {term.taken_hash} {term.weight}" for term in recipe.bases)])


def format_model_card(recipe: MergeRecipe, rounding_error: float) -> str:
    """A README for the merged checkpoint."""
    rows = [f"| {e.name or e.path} | {format_weight(e.weight)} | `{e.hash[:16]}` |" for e in recipe.adapters]
    rows += [
        f"| {term.added} minus {term.taken or recipe.base} | {term.weight:g} | `{term.added_hash[:16]}` |"
        for term in recipe.bases
    ]
    table = "\n".join(rows)
    return (
        f"# {recipe.base} with {len(rows)} merged in\n\n"
        f"| merged in | weight | hash |\n|---|---|---|\n{table}\n\n"
        f"Base: {recipe.base} (`{recipe.base_hash[:16]}`). Rounding to the stored precision changed what was merged in "
        f"by {rounding_error:.2%}. The recipe is in `{RECIPE_FILE}` and in the header of each weight file: "
        "`lora-diffusion merge --from` runs it again. Merged by lora_diffusion.\n"
    )


def recipe_json(recipe: MergeRecipe) -> str:
    """As it stands in headers."""
    return json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
