"""Open a base checkpoint, a diffusers folder or a single file, as a table of parameters by diffusers name.

No pipeline is built: parameters are read from the files one at a time.
"""

import os
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

_FULL_TENSOR = LdmKey(key="")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A parameter of the pipeline and its location in a checkpoint file."""

    file: Path
    info: TensorInfo
    """Header entry of the tensor in `file`."""
    data_start: int
    """Offset of the tensor data in `file`, in bytes."""
    part: LdmKey = _FULL_TENSOR
    """The part of the stored tensor that holds the parameter."""

    @property
    def kind(self) -> TensorKind:
        """The dtype, and the shape as in the pipeline."""
        shape = self.info.shape
        if self.part.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return self.info.dtype, shape[::-1] if self.part.transposed else shape

    def read(self) -> Tensor:
        """Read the parameter from the file.

        Raises:
            AdapterFormatError: If the file cannot be read or has been truncated.
        """
        tensor = read_tensor(self.file, self.info, self.data_start)
        if self.part.third is not None:
            tensor = tensor.chunk(3)[self.part.third]
        return tensor.T.contiguous() if self.part.transposed else tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A base checkpoint on disk: its family, its module layout, and the location of its parameters."""

    path: Path
    """The diffusers folder or the single file."""
    family: Family
    layout: ModelLayout
    parameters: Mapping[str, StoredTensor]
    """Parameters of the UNet and the text encoders, by name: `<module path>.weight` or `<module path>.bias`."""

    @property
    def is_folder(self) -> bool:
        """Whether the checkpoint is a diffusers folder rather than a single file."""
        return self.path.is_dir()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter as in the pipeline, by name."""
        return {name: stored.kind[1] for name, stored in self.parameters.items()}

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the file; for a folder, `base_hash` of its weight files."""
        if self.is_folder:
            return base_hash(self.path)
        return file_hash(self.path)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a base checkpoint by reading its file headers and configuration, but no weights.

    Args:
        path: A diffusers folder, or a single .safetensors file in the original layout.

    Raises:
        BaseModelError: If it is not an SD 1.x, SD 2.x or SDXL checkpoint.
    """
    path = Path(path)
    return _open_folder(path) if path.is_dir() else _open_single(path)


def _open_folder(path: Path) -> Checkpoint:
    family, layout = read_layout(path)
    locations = find_parameters(path, _parameter_names(layout))
    headers = {file: read_base_header(file) for file in {location.file for location in locations.values()}}
    parameters = {
        name: StoredTensor(
            file=location.file,
            info=headers[location.file].tensors[location.key],
            data_start=headers[location.file].data_start,
        )
        for name, location in locations.items()
    }
    return Checkpoint(path=path, family=family, layout=layout, parameters=parameters)


def _open_single(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise BaseModelError(
            f"{path}: is not a .safetensors file; convert it first, as pickled checkpoints can run code when loaded"
        )
    header = read_base_header(path)
    family, layout = detect_layout({key: info.shape for key, info in header.tensors.items()}, str(path))
    parameters: dict[str, StoredTensor] = {}
    for name in _parameter_names(layout):
        part = ldm_key(name, family, layout)
        if part is not None and part.key in header.tensors:
            info = header.tensors[part.key]
            parameters[name] = StoredTensor(file=path, info=info, data_start=header.data_start, part=part)
    return Checkpoint(path=path, family=family, layout=layout, parameters=parameters)


def _parameter_names(layout: ModelLayout) -> Iterator[str]:
    """Yield the names of all parameters that the UNet and text encoders can have; a base may lack some, as biases."""
    yield from (f"{path}.{leaf}" for path in changeable_paths(layout) for leaf in ("weight", "bias"))
    for component in layout.text_layers:
        yield from (f"{component}.text_model.embeddings.{table}_embedding.weight" for table in ("token", "position"))
