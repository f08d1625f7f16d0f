"""Record which patches are open on the models of a base, so that no two patches of a kind change the same modules.

A second weight patch would take the weights that the first one has blended for the original ones.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

from lora_diffusion.errors import ConfigError
from lora_diffusion.models.load import Base

PatchKind = Literal["weights", "parallel"]
"""How deltas are applied to a loaded base: added to its weights, or computed in parallel in the forward pass."""
_OPEN_PATCHES = "lora_diffusion_open_patches"
"""Attribute of a model with the kinds of patches that are open on it."""


def has_open_patch(base: Base, kind: PatchKind) -> bool:
    """Return whether a patch of a kind is open on any model of a base.

    This is recorded on the models, so it holds for all bases and pipelines that share one of them.
    """
    return any(kind in vars(model).get(_OPEN_PATCHES, ()) for model in base.adaptable_models)


@contextmanager
def exclusive_patch(base: Base, kind: PatchKind, conflict: str) -> Generator[None]:
    """Record on the models of a base that a patch of a kind is open, until the context exits.

    Args:
        base: Base model.
        kind: Kind of the patch.
        conflict: Error message if a patch of this kind is open on one of the models.

    Raises:
        ConfigError: If a patch of this kind is open already.
    """
    if has_open_patch(base, kind):
        raise ConfigError(conflict)
    models = base.adaptable_models
    for model in models:
        vars(model)[_OPEN_PATCHES] = {*vars(model).get(_OPEN_PATCHES, ()), kind}
    try:
        yield
    finally:
        for model in models:
            vars(model)[_OPEN_PATCHES] -= {kind}
