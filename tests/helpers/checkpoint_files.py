"""Write a base as a single-file checkpoint, and compare parameters."""

from pathlib import Path
from typing import Any

import torch

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.preset import BaseTerm
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import Base

FAMILIES = ["sd", "sdxl"]


def nothing(base: Base) -> list[BaseTerm]:
    """Return a merge term without effect: the base itself at weight 0."""
    return [BaseTerm(added=str(base.folder), weight=0.0)]


def as_single(base: Base, path: Path) -> Path:
    merge(str(base.folder), Blend(), path, bases=nothing(base))
    return path


def parameters_of(pipe: Any, components: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {f"{c}.{key}": value for c in components for key, value in getattr(pipe, c).state_dict().items()}
