"""Where a base's files are: the embedded base, a folder, a single file or a hub id."""

import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.compatibility import check_fits
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.config.settings import EMBEDDED_BASE
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import BaseModelError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lora_diffusion.formats.checkpoints.diffusers import check_is_stable_diffusion, check_pipeline_kind


def find_base(name: str) -> Path:
    """The folder of a base by the embedded one's name, a path or a hub id.

    Raises BaseModelError if there is none, or if it is not Stable Diffusion.
    """
    folder = sample_data_folder() / "tiny-sd" if name == EMBEDDED_BASE else Path(name)
    if folder.is_file():
        raise BaseModelError(f"{name}: is a single file; this version reads folders in diffusers' layout and hub ids")
    if not folder.is_dir():
        folder = download(name)
    check_is_stable_diffusion(folder)
    return folder.resolve()


def find_checkpoint(name: str) -> Checkpoint:
    """The weights of a base on disk: the embedded one, a folder, a single file in the original layout, or a hub id.

    Raises BaseModelError.
    """
    path = Path(name)
    return open_checkpoint(path.resolve() if path.is_file() else find_base(name))


def find_matching_checkpoint(name: str, blend: Blend) -> Checkpoint:
    """The same, if everything in every adapter finds its tensor there. Raises FamilyMismatchError as well."""
    checkpoint = find_checkpoint(name)
    check_fits_checkpoint(blend, checkpoint, name)
    return checkpoint


def check_fits_checkpoint(blend: Blend, checkpoint: Checkpoint, name: str) -> None:
    """Raise FamilyMismatchError unless everything in every adapter finds a tensor of its shape."""
    check_fits(
        blend,
        base_name=name,
        family=checkpoint.family.name,
        paths=frozenset(changeable_paths(checkpoint.layout)),
        shapes=checkpoint.shapes,
    )


def download(name: str) -> Path:
    """The local snapshot of a hub id."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BaseModelError(f"{name}: no such folder; expected `{EMBEDDED_BASE}`, a folder or a hub id (owner/name)")
    try:
        index: Any = DiffusionPipeline.load_config(name)
        check_pipeline_kind(name, index.get("_class_name"))
        return Path(DiffusionPipeline.download(name))
    except (OSError, ValueError) as error:
        if isinstance(error, BaseModelError):
            raise
        reason = first_line(error)
        raise BaseModelError(
            f"{name}: neither a folder here nor a base that the hub gives out ({reason}); check the name, "
            "the network, and HF_HUB_OFFLINE"
        ) from None


def first_line(error: Exception) -> str:
    """The gist of a library's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
