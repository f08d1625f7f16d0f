"""NP-LoRA: remove the main input directions of a style adapter from a subject adapter [arXiv:2511.11051]."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import WeightedAdapter
from lora_diffusion.adapters.factor_stack import is_joinable
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.svd.svd import spectrum_of
from lora_diffusion.errors import ConfigError

_ENERGY_FRACTION = 0.95
"""Fraction of a delta's squared singular values that its main directions hold."""


def project_out(subject: Adapter, style: Adapter, strength: float) -> Adapter:
    """Dampen the input directions of the subject that the style uses most [NP-LoRA, arXiv:2511.11051].

        delta' = delta (I - strength / (1 + strength) V V^T)

    V (in, k) holds the fewest right singular vectors of the style's delta that cover 95 % of the squared singular
    values. Only `down` of the subject changes, so the ranks stay the same. Modules that the style does not change are
    kept.

    Args:
        subject: Adapter to change.
        style: Adapter whose main directions are removed.
        strength: From 0 (no change) through 1 (half) to large values (complete removal).

    Raises:
        ConfigError: If a module that both adapters change has a layer other than plain LoRA.
    """
    shared = [path for path in subject.layers if path in style.layers]
    layers = {path: _dampen_directions(path, subject, style, strength / (1 + strength)) for path in shared}
    return replace(subject, layers={**subject.layers, **layers})


def project_entries(entries: Sequence[WeightedAdapter], strength: float) -> WeightedAdapter:
    """Remove the main directions of all other adapters from the first one, see `project_out`.

    Args:
        entries: The subject first, then the styles.
        strength: As in `project_out`.

    Returns:
        The first entry with its adapter changed and its weight unchanged.
    """
    subject = entries[0].adapter
    for style in entries[1:]:
        subject = project_out(subject, style.adapter, strength)
    return replace(entries[0], adapter=subject)


def _dampen_directions(path: str, subject: Adapter, style: Adapter, fraction: float) -> LoRALayer:
    first, second = subject.layers[path], style.layers[path]
    if not (isinstance(first, LoRALayer) and isinstance(second, LoRALayer)) or not (
        is_joinable(first) and is_joinable(second)
    ):
        raise ConfigError(
            f"{path}: the projection needs a plain LoRA layer in both adapters; found {first.kind} and {second.kind}"
        )
    directions = find_main_directions(second)
    down = first.down.float().flatten(1)
    projected = down - fraction * (down @ directions) @ directions.T
    return replace(first, down=projected.reshape(first.down.shape))


def find_main_directions(layer: LoRALayer) -> Tensor:
    """Return the fewest right singular vectors (in, k) of a delta that hold 95 % of its squared singular values."""
    spectrum = spectrum_of([(1.0, layer)])
    energy = spectrum.values.square()
    cumulative = energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(torch.float32).tiny)
    count = int((cumulative < _ENERGY_FRACTION).sum()) + 1 if bool(energy[0] > 0) else 0
    return spectrum.right[:count].T
