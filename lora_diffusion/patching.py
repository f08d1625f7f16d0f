"""Put a blend into a loaded base and take it out: in place, exact, reversible.

The base's own values are kept before anything is written and copied back afterwards; nothing is ever subtracted, so
undo gives the base back bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_diffusion.blend import Blend, blended_weight
from lora_diffusion.errors import FamilyMismatchError
from lora_diffusion.families import FAMILIES
from lora_diffusion.models import Base, module_at


def weight_at(base: Base, path: str) -> Tensor:
    """The live weight of the module at `path`."""
    weight = module_at(base, path).weight
    assert isinstance(weight, Tensor)
    return weight.data


def check_fits(base: Base, blend: Blend) -> None:
    """Raise FamilyMismatchError unless every layer of every adapter finds a weight of its shape in the base.

    Touches nothing.
    """
    for entry in blend.entries:
        adapter = entry.adapter
        name, family = adapter.metadata.name or "adapter", adapter.metadata.family
        if family and family != base.family.name:
            title = FAMILIES[family].title if family in FAMILIES else family
            raise FamilyMismatchError(
                f"{name} is an adapter for {title}, but {base.name} is {base.family.title}; use a base of its family"
            )
        known = set(base.paths)
        unknown = [path for path in adapter.layers if path not in known]
        if unknown:
            raise FamilyMismatchError(
                f"{name}: {len(unknown)} of {len(adapter.layers)} layers match no module of {base.name} "
                f"({base.family.title}; first: {unknown[0]}); use the base that it was trained on"
            )
        for path, layer in adapter.layers.items():
            shape = tuple(weight_at(base, path).shape)
            if layer.weight_shape != shape:
                raise FamilyMismatchError(
                    f"{name}: {path} is for a weight of shape {layer.weight_shape}, but {base.name} has {shape} there; "
                    "use the base that it was trained on"
                )


@contextmanager
def blended(base: Base, blend: Blend) -> Iterator[Base]:
    """The base with the blend in its weights; the base's own values are back afterwards, whatever happens inside.

    Raises FamilyMismatchError before anything is touched.
    """
    check_fits(base, blend)
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for path in blend.paths:
                weight = weight_at(base, path)
                value = blended_weight(weight, blend, path)
                kept[path] = weight.clone()
                weight.copy_(value)
        yield base
    finally:
        with torch.no_grad():
            for path, value in kept.items():
                weight_at(base, path).copy_(value)
