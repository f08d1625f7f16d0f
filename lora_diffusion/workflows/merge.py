"""Merging of adapter files and checkpoints into a checkpoint, also by the recipe of an earlier merge, and its undo."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.config.generate import LoadConfig
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm, BlendEntry
from lora_diffusion.errors import ConfigError, LoRADiffusionError
from lora_diffusion.library.presets import read_preset
from lora_diffusion.library.references import AdapterResolver, load_blend, resolve_entry_paths
from lora_diffusion.merging.merge import MergeReport, merge
from lora_diffusion.merging.recipe import read_merge_recipe
from lora_diffusion.merging.undo import copy_base, find_original_base, subtract_blend
from lora_diffusion.merging.writer import OnProgress
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.workflows.images.generate import load_and_resolve_blend


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """A merge, with adapters and checkpoints by reference."""

    base: str
    """Checkpoint to merge into: `tiny-sd`, a folder, a single file or a hub id."""
    entries: tuple[BlendEntry, ...] = ()
    """Adapters by path or hash, with weights."""
    bases: tuple[BaseTerm, ...] = ()
    """Differences of checkpoints to add."""
    config: MergeConfig = field(default_factory=MergeConfig)
    """Output type, shard size and rounding."""
    like: str | os.PathLike[str] | None = None
    """Folder whose tokenizer and configuration are copied if the base is a single file."""
    base_hash: str = ""
    """Hash that the base must have, for a merge by recipe; empty for any."""
    force: bool = False
    """Whether an existing output is replaced, and a merge that the base already contains is repeated."""


def read_preset_entries(path: str | os.PathLike[str]) -> tuple[str, tuple[BlendEntry, ...]]:
    """Read the base and the adapters of a preset.

    Args:
        path: The preset file.

    Returns:
        The base, and the adapters with paths relative to the working folder.

    Raises:
        ConfigError: If the preset cannot be read, or its composition is not a sum and cannot be merged into weights.
    """
    path = Path(path)
    preset = read_preset(path)
    mode = preset.composition.mode if preset.composition else "sum"
    if mode != "sum":
        raise ConfigError(
            f"{path}: its composition mode is {mode!r}, which cannot be merged into weights; expected 'sum'; "
            "`lora-diffusion distill` trains an adapter that approximates other modes"
        )
    return preset.base, resolve_entry_paths(preset.adapters, path.parent)


def request_from_checkpoint(path: str | os.PathLike[str], *, base: str, force: bool) -> MergeRequest:
    """Return the request that reproduces a merged checkpoint.

    Args:
        path: The merged checkpoint, a folder or a single file.
        base: Where the base is now; empty for the path or name in the recipe.
        force: Whether an existing output is replaced, and a merge that the base already contains is repeated.

    Raises:
        ConfigError: If the checkpoint does not exist or has no recipe.
    """
    recipe = read_merge_recipe(Path(path))
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
    request: MergeRequest,
    output: str | os.PathLike[str],
    load: LoadConfig | None = None,
    resolver: AdapterResolver | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[MergeReport, tuple[str, ...]]:
    """Merge adapter files and differences of checkpoints into a checkpoint.

    Args:
        request: The base, the adapters and the settings.
        output: Folder or single file to write.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.
        on_progress: Called with the written share of the output, 0 to 1.

    Returns:
        The report of the merge, and messages for the user.

    Raises:
        LoRADiffusionError: If an input is invalid or the output cannot be written.
    """
    resolved = load_and_resolve_blend(request.base, request.entries, load or LoadConfig(), resolver)
    if request.base_hash and find_checkpoint(request.base).hash != request.base_hash:
        raise ConfigError(
            f"{request.base}: is not the base of the recipe, whose hash is {request.base_hash[:12]}; give that base "
            "with --base"
        )
    report = merge(
        request.base,
        resolved.blend,
        Path(output),
        request.config,
        bases=request.bases,
        like=Path(request.like) if request.like else None,
        force=request.force,
        on_progress=on_progress,
    )
    return report, resolved.notes


def undo_files(
    merged: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str = "",
    load: LoadConfig | None = None,
    resolver: AdapterResolver | None = None,
) -> str:
    """Restore the base of a merged checkpoint, bit for bit.

    The base is copied if it is found. Otherwise the adapters are subtracted, which is refused if the result would not
    be exact.

    Args:
        merged: The merged checkpoint, a folder or a single file.
        output: Folder or single file to write.
        base: Where the base is now; empty for the path or name in the recipe.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.

    Returns:
        A sentence that says how the base was restored.

    Raises:
        ConfigError: If the checkpoint has no recipe, or neither its base nor all of its adapters are found.
    """
    merged, output = Path(merged), Path(output)
    recipe = read_merge_recipe(merged)
    original = find_original_base(recipe, base)
    if original is not None:
        copy_base(original, output)
        return f"copied from {original.path}"
    load = load or LoadConfig()
    resolver = resolver or AdapterResolver(library_folder=load.library)
    try:
        resolved = load_blend(recipe.adapters, resolver, ignore=load.ignore_unmatched)
    except LoRADiffusionError as error:
        raise ConfigError(
            f"{merged}: neither its base {recipe.base!r} (hash {recipe.base_hash[:12]}) nor all of its adapters were "
            f"found ({error}); give the base with --base"
        ) from None
    subtract_blend(merged, recipe, resolved.blend, output)
    return "the adapters were subtracted; every changed weight equals that of the base"
