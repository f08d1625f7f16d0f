"""Checks of preset files: whether each adapter is found, fits the base, and goes together with the others."""

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


def check_preset(path: Path, resolver: AdapterResolver, ignore: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What is wrong with a preset: pairs of what was checked and what came of it, empty if all is well.

    Each adapter has to be found with its hash, its weight has to fit its base, and all have to go together.
    """
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
    """Explain why the adapters cannot be composed as the preset says; empty if they can."""
    active = sum(not is_zero(entry.weight) for entry in preset.adapters)
    try:
        validate_composition(preset.composition, active, regions=any(entry.region for entry in preset.adapters))
    except ConfigError as error:
        return str(error)
    return ""


def _explain_entry_problem(
    entry: BlendEntry, resolver: AdapterResolver, ignore: Sequence[str], family: str, layout: ModelLayout | None
) -> str:
    """Explain why an adapter cannot be used as the preset says; empty if it can."""
    try:
        found = load_blend([entry], resolver, ignore=ignore)
        if entry.region:
            region_mask(entry.region)
        own = found.blend.entries[0].adapter.metadata.family
        if family and own and own != family:
            return f"is for {own}, the preset's base is {family}"
        if layout is not None:
            expand_block_preset(entry.weight, layout)
    except LoRADiffusionError as error:
        return str(error)
    return "; ".join(found.notes)
