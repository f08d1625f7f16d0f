"""Find the files of a base: the embedded base, a local folder, a single file or a hub id."""

# diffusers loads its classes lazily, which looks like private imports to the type checker.
# pyright: reportPrivateImportUsage=false

import os
import re
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.compatibility import check_fits
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.config.settings import EMBEDDED_BASE
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import BaseModelError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lora_diffusion.formats.checkpoints.diffusers import check_is_stable_diffusion, check_pipeline_kind

_PIPELINE: Any = cast(Any, DiffusionPipeline)  # diffusers does not annotate the keyword arguments of its class methods


def find_base(name: str | os.PathLike[str]) -> Path:
    """Return the folder of a base, and download it from the hub if necessary.

    Args:
        name: `tiny-sd` for the embedded base, a folder in diffusers' layout, or a hub id such as `owner/name`.

    Raises:
        BaseModelError: If there is no such base, or if it is not Stable Diffusion.
    """
    name = os.fspath(name)
    folder = sample_data_folder() / "tiny-sd" if name == EMBEDDED_BASE else Path(name)
    if folder.is_file():
        raise BaseModelError(
            f"{name}: single-file checkpoints are not supported here; give a folder in diffusers' layout or a hub id"
        )
    if not folder.is_dir():
        folder = _download(name)
    check_is_stable_diffusion(folder)
    return folder.resolve()


def find_checkpoint(name: str | os.PathLike[str]) -> Checkpoint:
    """Open the weight files of a base without loading them.

    Args:
        name: `tiny-sd`, a folder in diffusers' layout, a single file in the original (LDM) layout, or a hub id.

    Raises:
        BaseModelError: If there is no such base, or if it is not Stable Diffusion.
    """
    path = Path(name)
    return open_checkpoint(path.resolve() if path.is_file() else find_base(name))


def find_matching_checkpoint(name: str | os.PathLike[str], blend: Blend) -> Checkpoint:
    """Open the weight files of a base and check that every adapter of a blend fits them.

    Raises:
        BaseModelError: If there is no such base, or if it is not Stable Diffusion.
        FamilyMismatchError: If an adapter changes a tensor that the base lacks or has in another shape.
    """
    checkpoint = find_checkpoint(name)
    check_fits_checkpoint(blend, checkpoint, os.fspath(name))
    return checkpoint


def check_fits_checkpoint(blend: Blend, checkpoint: Checkpoint, name: str) -> None:
    """Check that every tensor that a blend changes exists in a checkpoint with the same shape.

    Args:
        blend: The adapters to check.
        checkpoint: The weight files of the base.
        name: The base's name for error messages.

    Raises:
        FamilyMismatchError: If a tensor is missing or has another shape.
    """
    check_fits(
        blend,
        base_name=name,
        family=checkpoint.family.name,
        paths=frozenset(changeable_paths(checkpoint.layout)),
        shapes=checkpoint.shapes,
    )


def _download(name: str) -> Path:
    """Return the local snapshot of a hub id, and download what is missing. Raises BaseModelError."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BaseModelError(f"{name}: no such folder; expected `{EMBEDDED_BASE}`, a folder or a hub id (owner/name)")
    try:
        index = _PIPELINE.load_config(name)
        check_pipeline_kind(name, index.get("_class_name"))
        return Path(_PIPELINE.download(name))
    except (OSError, ValueError) as error:
        if isinstance(error, BaseModelError):
            raise
        reason = first_line(error)
        raise BaseModelError(
            f"{name}: not a local folder, and it cannot be downloaded from the Hugging Face hub ({reason}); check the "
            "name, the network, and HF_HUB_OFFLINE"
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
