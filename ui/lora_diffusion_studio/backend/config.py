"""Folders, base models and file names of a studio."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.config.settings import EMBEDDED_BASE, Quantization
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.locate import find_checkpoint

_FILE_NAME = re.compile(r"[\w][\w .,'+()-]{0,59}")


@dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """Folders and base models of a studio. Users cannot make it read or write any other folder."""

    library: Path
    """Folder of the adapters."""
    output: Path
    """Folder for images, presets, masks, merged checkpoints and training runs."""
    bases: tuple[str, ...]
    """Base models on offer: names, folders or hub ids. The first one is the default."""
    quantization: Quantization = "none"
    """Quantization of the base models' linear layers."""

    @property
    def presets(self) -> Path:
        """Folder of the presets that users saved."""
        return self.output / "presets"

    @property
    def masks(self) -> Path:
        """Folder of the region masks that users painted."""
        return self.output / "masks"


def resolve_bases(names: Sequence[str]) -> tuple[str, ...]:
    """Return the given base models, or the embedded one if there are none.

    Raises:
        BaseModelError: If a base model does not exist.
    """
    for name in names:
        find_checkpoint(name)
    return tuple(names) or (EMBEDDED_BASE,)


def create_default_library(output: Path) -> Path:
    """Create the folder `library` in the output folder, with a copy of the packaged adapters, and return it."""
    folder = output / "library"
    if not folder.is_dir():
        shutil.copytree(
            sample_data_folder() / "adapters", folder, ignore=lambda _, names: [n for n in names if n[0] == "."]
        )
    return folder


def packaged_presets_folder() -> Path:
    """Return the folder of the presets that come with the package."""
    return sample_data_folder() / "presets"


def check_file_name(name: str) -> str:
    """Return the name without surrounding spaces if it is safe as a file name.

    Raises:
        ConfigError: If it is empty, has more than 60 characters, or has others than letters, digits, spaces and
            . , ' + - ( ).
    """
    stripped = name.strip()
    if not stripped:
        raise ConfigError("the name is empty; enter a name")
    if not _FILE_NAME.fullmatch(stripped):
        raise ConfigError(
            f"{name!r} is not a valid name; start with a letter or digit and use at most 60 letters, digits, spaces "
            "and . , ' + - ( )"
        )
    return stripped
