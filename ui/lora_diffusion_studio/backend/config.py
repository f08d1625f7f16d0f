"""Folders and file names of a studio."""

import re
import shutil
from pathlib import Path

from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError

_FILE_NAME = re.compile(r"[\w][\w .,'+()-]{0,59}")


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
