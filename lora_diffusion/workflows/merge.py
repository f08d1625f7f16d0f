"""What `lora-diffusion merge` does between its flags and the library: merge, merge again by recipe, and undo."""

from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm, BlendEntry
from lora_diffusion.errors import ConfigError, LoRADiffusionError
from lora_diffusion.library.presets import read_preset
from lora_diffusion.library.references import load_blend, resolve_entry_paths
from lora_diffusion.merging.merge import MergeReport, merge
from lora_diffusion.merging.recipe import read_merge_recipe
from lora_diffusion.merging.undo import copy_base, find_original_base, subtract_blend
from lora_diffusion.merging.writer import OnProgress
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.workflows.images.generate import LoadOptions, load_and_resolve_blend


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """A merge, with adapters and checkpoints by reference."""

    base: str
    entries: tuple[BlendEntry, ...] = ()
    bases: tuple[BaseTerm, ...] = ()
    config: MergeConfig = field(default_factory=MergeConfig)
    like: Path | None = None
    base_hash: str = ""
    """That of the base of the recipe that is run again."""
    force: bool = False


def read_preset_entries(path: Path) -> tuple[str, tuple[BlendEntry, ...]]:
    """Return base and adapters of a preset. Raises ConfigError for modes that weights cannot hold."""
    preset = read_preset(path)
    mode = preset.composition.mode if preset.composition else "sum"
    if mode != "sum":
        raise ConfigError(
            f"{path}: blends by {mode}, which no weights can hold; `lora-diffusion distill` comes near it"
        )
    return preset.base, resolve_entry_paths(preset.adapters, path.parent)


def request_from_checkpoint(path: Path, *, base: str, force: bool) -> MergeRequest:
    """Return the request that made a merged checkpoint. Raises ConfigError if it has no recipe."""
    recipe = read_merge_recipe(path)
    return MergeRequest(
        base=base or recipe.base,
        entries=recipe.adapters,
        bases=recipe.bases,
        config=recipe.config,
        like=Path(recipe.like) if recipe.like else None,
        base_hash=recipe.base_hash,
        force=force,
    )


def merge_files(
    request: MergeRequest, output: Path, options: LoadOptions | None = None, on_progress: OnProgress | None = None
) -> tuple[MergeReport, tuple[str, ...]]:
    """Merge adapter files and other checkpoints into a base; also notes of where things were found.

    Raises LoRADiffusionError's children.
    """
    found = load_and_resolve_blend(request.base, request.entries, options or LoadOptions())
    if request.base_hash and find_checkpoint(request.base).hash != request.base_hash:
        raise ConfigError(
            f"{request.base}: is not the base of the recipe (hash {request.base_hash[:12]}); give that one with --base"
        )
    report = merge(
        request.base,
        found.blend,
        output,
        request.config,
        bases=request.bases,
        like=request.like,
        force=request.force,
        on_progress=on_progress,
    )
    return report, found.notes


def undo_files(merged: Path, output: Path, *, base: str, options: LoadOptions | None = None) -> str:
    """Write the base of a merged checkpoint to `output`, bit for bit; returns how it was had.

    Raises ConfigError if neither the base nor the adapters give it back.
    """
    recipe = read_merge_recipe(merged)
    own = find_original_base(recipe, base)
    if own is not None:
        copy_base(own, output)
        return f"copied from {own.path}"
    options = options or LoadOptions()
    try:
        found = load_blend(recipe.adapters, options.resolver, ignore=options.ignore)
    except LoRADiffusionError as error:
        raise ConfigError(
            f"{merged}: its base {recipe.base!r} (hash {recipe.base_hash[:12]}) is not at hand, and neither are all "
            f"adapters ({error}); give the base with --base"
        ) from None
    subtract_blend(merged, recipe, found.blend, output)
    return "the adapters were subtracted; every changed weight is the base's own"
