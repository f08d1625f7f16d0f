"""A base's weights by our own names, whether it is a folder in diffusers' layout or a single file in the original one.

Nothing is loaded as a pipeline: tensors are read from the files one at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lora_diffusion.architectures.families import Family
from lora_diffusion.architectures.module_paths import ModelLayout, changeable_paths
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.errors import BaseModelError
from lora_diffusion.formats.checkpoints.diffusers import (
    base_hash,
    find_parameters,
    read_base_header,
    read_layout,
)
from lora_diffusion.formats.checkpoints.ldm_detection import detect_layout
from lora_diffusion.formats.checkpoints.ldm_keys import LdmKey, ldm_key
from lora_diffusion.formats.safetensors import TensorInfo, TensorKind, read_tensor

WHOLE = LdmKey(key="")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor of the pipeline lies in a file."""

    file: Path
    info: TensorInfo
    data_start: int
    part: LdmKey = WHOLE
    """Which part of the file's tensor is meant."""

    @property
    def kind(self) -> TensorKind:
        """Type, and shape as the pipeline has it."""
        shape = self.info.shape
        if self.part.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return self.info.dtype, shape[::-1] if self.part.transposed else shape

    def read(self) -> Tensor:
        """The values, in memory of their own. Raises AdapterFormatError if the file has become shorter."""
        tensor = read_tensor(self.file, self.info, self.data_start)
        if self.part.third is not None:
            tensor = tensor.chunk(3)[self.part.third]
        return tensor.T.contiguous() if self.part.transposed else tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A base on disk: what it is, and where each of its parameters lies."""

    path: Path
    family: Family
    layout: ModelLayout
    parameters: Mapping[str, StoredTensor]
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
    family, shape = read_layout(path)
    found = find_parameters(path, parameter_names(shape))
    headers = {file: read_base_header(file) for file in {place.file for place in found.values()}}
    parameters = {
        name: StoredTensor(file=at.file, info=headers[at.file].tensors[at.key], data_start=headers[at.file].data_start)
        for name, at in found.items()
    }
    return Checkpoint(path=path, family=family, layout=shape, parameters=parameters)


def open_single(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise BaseModelError(
            f"{path}: is no .safetensors file; convert it first, as other kinds of checkpoint can run code when opened"
        )
    header = read_base_header(path)
    family, shape = detect_layout({key: slot.shape for key, slot in header.tensors.items()}, str(path))
    parameters: dict[str, StoredTensor] = {}
    for name in parameter_names(shape):
        place = ldm_key(name, family, shape)
        if place is not None and place.key in header.tensors:
            slot = header.tensors[place.key]
            parameters[name] = StoredTensor(file=path, info=slot, data_start=header.data_start, part=place)
    return Checkpoint(path=path, family=family, layout=shape, parameters=parameters)


def parameter_names(shape: ModelLayout) -> Iterator[str]:
    """Every parameter that the UNet and the text encoders may have, whether this base has it or not."""
    yield from (f"{path}.{leaf}" for path in changeable_paths(shape) for leaf in ("weight", "bias"))
    for component in shape.text_layers:
        yield from (f"{component}.text_model.embeddings.{table}_embedding.weight" for table in ("token", "position"))
