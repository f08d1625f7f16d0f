"""A base's weights by our own names, whether it is a folder in diffusers' layout or a single file in the original one.

Nothing is loaded as a pipeline: tensors are read from the files one at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lora_diffusion.architectures.families import Family
from lora_diffusion.architectures.module_paths import Anatomy, changeable_paths
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.errors import BaseModelError
from lora_diffusion.formats.checkpoints.diffusers import (
    anatomy_of_folder,
    base_hash,
    find_parameters,
    header_of_base,
)
from lora_diffusion.formats.checkpoints.ldm_detection import original_anatomy
from lora_diffusion.formats.checkpoints.ldm_keys import OriginalPlace, original_place
from lora_diffusion.formats.safetensors import Slot, TensorKind, read_slot

WHOLE = OriginalPlace(key="")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor of the pipeline lies in a file."""

    file: Path
    slot: Slot
    data_start: int
    part: OriginalPlace = WHOLE
    """Which part of the file's tensor is meant."""

    @property
    def kind(self) -> TensorKind:
        """Type, and shape as the pipeline has it."""
        shape = self.slot.shape
        if self.part.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return self.slot.dtype, shape[::-1] if self.part.transposed else shape

    def read(self) -> Tensor:
        """The values, in memory of their own. Raises AdapterFormatError if the file has become shorter."""
        tensor = read_slot(self.file, self.slot, self.data_start)
        if self.part.third is not None:
            tensor = tensor.chunk(3)[self.part.third]
        return tensor.T.contiguous() if self.part.transposed else tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A base on disk: what it is, and where each of its parameters lies."""

    path: Path
    family: Family
    anatomy: Anatomy
    parameters: Mapping[str, Stored]
    """Those of UNet and text encoders, by name: `<module path>.weight` and `.bias`."""

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, as the pipeline has them."""
        return {name: stored.kind[1] for name, stored in self.parameters.items()}

    @cached_property
    def hash(self) -> str:
        """Of a folder over its weight files, of a single file over its bytes, SHA-256."""
        if self.is_folder:
            return base_hash(self.path)
        return file_hash(self.path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Look at a base's headers and configuration; reads no weights.

    Raises BaseModelError for anything but a Stable Diffusion base.
    """
    return open_folder(path) if path.is_dir() else open_single(path)


def open_folder(path: Path) -> Checkpoint:
    family, shape = anatomy_of_folder(path)
    found = find_parameters(path, parameter_names(shape))
    headers = {file: header_of_base(file) for file in {place.file for place in found.values()}}
    parameters = {
        name: Stored(file=at.file, slot=headers[at.file].slots[at.key], data_start=headers[at.file].data_start)
        for name, at in found.items()
    }
    return Checkpoint(path=path, family=family, anatomy=shape, parameters=parameters)


def open_single(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise BaseModelError(
            f"{path}: is no .safetensors file; convert it first, as other kinds of checkpoint can run code when opened"
        )
    header = header_of_base(path)
    family, shape = original_anatomy({key: slot.shape for key, slot in header.slots.items()}, str(path))
    parameters: dict[str, Stored] = {}
    for name in parameter_names(shape):
        place = original_place(name, family, shape)
        if place is not None and place.key in header.slots:
            slot = header.slots[place.key]
            parameters[name] = Stored(file=path, slot=slot, data_start=header.data_start, part=place)
    return Checkpoint(path=path, family=family, anatomy=shape, parameters=parameters)


def parameter_names(shape: Anatomy) -> Iterator[str]:
    """Every parameter that the UNet and the text encoders may have, whether this base has it or not."""
    yield from (f"{path}.{leaf}" for path in changeable_paths(shape) for leaf in ("weight", "bias"))
    for component in shape.text_layers:
        yield from (f"{component}.text_model.embeddings.{table}_embedding.weight" for table in ("token", "position"))
