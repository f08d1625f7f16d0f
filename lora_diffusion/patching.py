"""Put a blend into a loaded base and take it out: in place, exact, reversible.

The base's own values are kept before anything is written and copied back afterwards; nothing is ever subtracted, so
undo gives the base back bit for bit.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakSet

import torch
from torch import Tensor

from lora_diffusion.anatomy import changeable_paths
from lora_diffusion.blend import Blend, blend_bias, blend_delta, blended_weight, check_fits, wanted_shapes
from lora_diffusion.errors import ConfigError
from lora_diffusion.models import Base, module_at

BLENDED: WeakSet[Base] = WeakSet()
"""Bases that have a blend in their weights at this moment."""


def weight_at(base: Base, path: str) -> Tensor:
    """The live weight of the module at `path`. Raises KeyError."""
    return parameter_at(base, f"{path}.weight")


def parameter_at(base: Base, name: str) -> Tensor:
    """The live tensor of a parameter, `<module path>.weight` or `.bias`. Raises KeyError if there is none."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(module_at(base, path), leaf, None)
    if not isinstance(tensor, Tensor):
        raise KeyError(name)
    return tensor.data


def live_shapes(base: Base, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of those parameters that the base has."""
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        with suppress(KeyError):
            found[name] = tuple(parameter_at(base, name).shape)
    return found


def check_base_fits(base: Base, blend: Blend) -> None:
    """Raise FamilyMismatchError unless every layer of every adapter finds a weight of its shape. Touches nothing."""
    paths = frozenset(changeable_paths(base.anatomy))
    wanted = {name for entry in blend.entries for name in wanted_shapes(entry.adapter)}
    shapes = live_shapes(base, (name for name in wanted if name.rpartition(".")[0] in paths))
    check_fits(blend, base_name=base.name, family=base.family.name, paths=paths, shapes=shapes)


def changed_parameters(base: Base, blend: Blend) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every parameter that the blend changes: name, live tensor and new value."""
    for path in blend.paths:
        weight = weight_at(base, path)
        yield f"{path}.weight", weight, blended_weight(weight, blend_delta(blend, path, weight), path)
    for path in blend.bias_paths:
        bias = parameter_at(base, f"{path}.bias")
        yield f"{path}.bias", bias, blended_weight(bias, blend_bias(blend, path, bias), path)


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
            for name, live, value in changed_parameters(base, blend):
                kept[name] = live.clone()
                live.copy_(value)
        yield base
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameter_at(base, name).copy_(value)
        BLENDED.discard(base)
