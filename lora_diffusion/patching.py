"""Put a blend into a loaded base and take it out: in place, exact, reversible.

The base's own values are kept before anything is written and copied back afterwards; nothing is ever subtracted, so
undo gives the base back bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor

from lora_diffusion.blend import Blend, blend_delta, blended_weight, check_fits
from lora_diffusion.errors import ConfigError
from lora_diffusion.models import Base, module_at

BLENDED: WeakSet[Base] = WeakSet()
"""Bases that have a blend in their weights at this moment."""


def weight_at(base: Base, path: str) -> Tensor:
    """The live weight of the module at `path`."""
    weight = module_at(base, path).weight
    assert isinstance(weight, Tensor)
    return weight.data


def check_base_fits(base: Base, blend: Blend) -> None:
    """Raise FamilyMismatchError unless every layer of every adapter finds a weight of its shape. Touches nothing."""
    paths = frozenset(base.paths)
    wanted = {path for entry in blend.entries for path in entry.adapter.layers if path in paths}
    shapes = {path: tuple(weight_at(base, path).shape) for path in wanted}
    check_fits(blend, base_name=base.name, family=base.family.name, paths=paths, shapes=shapes)


@contextmanager
def blended(base: Base, blend: Blend) -> Iterator[Base]:
    """The base with the blend in its weights; the base's own values are back afterwards, whatever happens inside.

    Raises FamilyMismatchError before anything is touched, and ConfigError if the base has a blend in it already: a
    second one would take the first one's weights for the base's own.
    """
    check_base_fits(base, blend)
    if base in BLENDED:
        raise ConfigError(
            f"{base.name} has a blend in its weights already; leave that one first, or load a second base"
        )
    kept: dict[str, Tensor] = {}
    BLENDED.add(base)
    try:
        with torch.no_grad():
            for path in blend.paths:
                weight = weight_at(base, path)
                value = blended_weight(weight, blend_delta(blend, path, weight.device), path)
                kept[path] = weight.clone()
                weight.copy_(value)
        yield base
    finally:
        with torch.no_grad():
            for path, value in kept.items():
                weight_at(base, path).copy_(value)
        BLENDED.discard(base)
