"""One adapter without the main directions of another, in closed form on the factors."""

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

MAIN_SHARE = 0.95
"""Share of a delta's squared singular values that its main directions hold."""


def project_out(subject: Adapter, style: Adapter, strength: float) -> Adapter:
    """The subject with the input directions that the style uses most damped [NP-LoRA, arXiv:2511.11051].

        delta' = delta (I - strength / (1 + strength) V V^T)

    V (in, k) are the fewest right singular vectors of the style's delta that hold 95 % of its squared singular values.
    Acts on the subject's `down` alone, so ranks stay. Where the two share no module, the subject is as it was. Raises
    ConfigError for layers other than plain LoRA at shared modules.
    """
    shared = [path for path in subject.layers if path in style.layers]
    layers = {path: damp_directions(path, subject, style, strength / (1 + strength)) for path in shared}
    return replace(subject, layers={**subject.layers, **layers})


def project_entries(entries: Sequence[WeightedAdapter], strength: float) -> WeightedAdapter:
    """The first of several adapters without the main directions of each other one."""
    subject = entries[0].adapter
    for style in entries[1:]:
        subject = project_out(subject, style.adapter, strength)
    return replace(entries[0], adapter=subject)


def damp_directions(path: str, subject: Adapter, style: Adapter, share: float) -> LoRALayer:
    first, second = subject.layers[path], style.layers[path]
    if not (isinstance(first, LoRALayer) and isinstance(second, LoRALayer)) or not (
        is_joinable(first) and is_joinable(second)
    ):
        raise ConfigError(f"{path}: a projection needs plain LoRA in both adapters, not {first.kind} and {second.kind}")
    directions = find_main_directions(second)
    down = first.down.float().flatten(1)
    moved = down - share * (down @ directions) @ directions.T
    return replace(first, down=moved.reshape(first.down.shape))


def find_main_directions(layer: LoRALayer) -> Tensor:
    """The right singular vectors (in, k) of a layer's delta that hold its main part."""
    spectrum = spectrum_of([(1.0, layer)])
    energy = spectrum.values.square()
    held = energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(torch.float32).tiny)
    count = int((held < MAIN_SHARE).sum()) + 1 if bool(energy[0] > 0) else 0
    return spectrum.right[:count].T
