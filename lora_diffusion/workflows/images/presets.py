"""Checks of preset files: whether the base, each adapter and the composition can be used."""

import os
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.adapters.coefficients import expand_block_preset, is_zero
from lora_diffusion.adapters.compatibility import validate_composition
from lora_diffusion.adapters.masks import region_mask
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.preset import BlendEntry, BlendPreset
from lora_diffusion.errors import ConfigError, LoRADiffusionError
from lora_diffusion.formats.checkpoints.diffusers import read_layout
from lora_diffusion.library.presets import read_preset
from lora_diffusion.library.references import AdapterResolver, load_blend, resolve_entry_paths
from lora_diffusion.models.locate import find_base


def check_preset(
    path: str | os.PathLike[str], resolver: AdapterResolver, ignore: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Check that the base of a preset is found, and that each adapter is found by its hash and fits the base.

    Args:
        path: The preset file.
        resolver: Finds adapters by path, hash or name.
        ignore: Patterns of keys that adapter files may contain although they are not understood.

    Returns:
        A pair for each check: the name of what was checked, and the problem, which is empty if there is none.

    Raises:
        ConfigError: If the preset cannot be read.
    """
    path = Path(path)
    preset = read_preset(path)
    checks: list[tuple[str, str]] = []
    try:
        family, layout = read_layout(find_base(preset.base))
        checks.append((f"base {preset.base}", ""))
    except LoRADiffusionError as error:
        checks.append((f"base {preset.base}", str(error)))
        family = layout = None
    for entry in resolve_entry_paths(preset.adapters, path.parent):
        checks.append(
            (
                f"adapter {entry.name or entry.path}",
                _explain_entry_problem(entry, resolver, ignore, family.name if family else "", layout),
            )
        )
    checks.append(("composition", _explain_composition_problem(preset)))
    return checks


def _explain_composition_problem(preset: BlendPreset) -> str:
    """Explain why the adapters cannot be combined with the preset's composition; empty if they can."""
    active = sum(not is_zero(entry.weight) for entry in preset.adapters)
    try:
        validate_composition(preset.composition, active, regions=any(entry.region for entry in preset.adapters))
    except ConfigError as error:
        return str(error)
    return ""


def _explain_entry_problem(
    entry: BlendEntry, resolver: AdapterResolver, ignore: Sequence[str], family: str, layout: ModelLayout | None
) -> str:
    """Explain why an adapter cannot be used with its weight and region in the preset; empty if it can."""
    try:
        resolved = load_blend([entry], resolver, ignore=ignore)
        if entry.region:
            region_mask(entry.region)
        adapter_family = resolved.blend.entries[0].adapter.metadata.family
        if family and adapter_family and adapter_family != family:
            return f"is for {adapter_family}, but the preset's base is {family}"
        if layout is not None:
            expand_block_preset(entry.weight, layout)
    except LoRADiffusionError as error:
        return str(error)
    return "; ".join(resolved.notes)
