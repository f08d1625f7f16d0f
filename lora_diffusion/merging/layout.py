"""Plan the files of a merged checkpoint: each output tensor and the tensors of the base that it is computed from.

Input and output can each be a folder in diffusers' layout or a single file in the original (LDM) layout; all four
combinations are supported. Only file headers and configuration files are read here.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.core.dtypes import FLOAT_TYPES
from lora_diffusion.errors import BaseModelError, ConfigError
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint, StoredTensor
from lora_diffusion.formats.checkpoints.diffusers import (
    list_components,
    read_base_header,
    read_json,
    text_encoder_names,
    weight_files,
)
from lora_diffusion.formats.checkpoints.ldm_keys import LdmKey, ldm_key
from lora_diffusion.formats.safetensors import ITEM_BYTES, TensorKind

_HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Header entries with a hash of the base, which would be wrong in the merged file."""


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """A tensor of the base that an output tensor is computed from."""

    stored: StoredTensor
    """Location of the tensor in the files of the base."""
    name: str = ""
    """Parameter name, `<module path>.weight` or `<module path>.bias`; empty if a merge never changes the tensor."""


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """A tensor to write: its parts are concatenated along the first axis, then transposed, then reshaped."""

    kind: TensorKind
    """Type and shape in the output file."""
    parts: tuple[SourceTensor, ...]
    """Several parts are the queries, keys and values of a fused attention projection."""
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in the output file."""
        return ITEM_BYTES[self.kind[0]] * math.prod(self.kind[1])


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A weight file to write."""

    name: str
    """Path relative to the output folder; empty if the output is a single file."""
    tensors: Mapping[str, OutputTensor]
    """Tensors by key, in the order of the file."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """Metadata for the safetensors header."""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """All files of a merged checkpoint."""

    files: tuple[OutputFile, ...]
    """Weight files to compute."""
    copies: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Files and folders to copy, by their path relative to the output."""
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Contents of text files to write, by their path relative to the output."""

    @property
    def num_bytes(self) -> int:
        """Size of all weights."""
        return sum(file.num_bytes for file in self.files)


def plan_output(
    base: Checkpoint, *, single: bool, like: str | os.PathLike[str] | None, config: MergeConfig
) -> OutputPlan:
    """Plan the files of a merged checkpoint.

    Args:
        base: Checkpoint to merge into.
        single: Write a single file instead of a folder.
        like: Folder of the same family whose tokenizer and configuration are copied; required to write a single-file
            base as a folder.
        config: Output type and shard size.

    Raises:
        ConfigError: If `like` is missing where it is required.
        BaseModelError: If a tensor is missing in the base, or has another shape than in `like`.
    """
    precision = config.precision
    shard_bytes = round(config.shard_gb * 1e9) if config.shard_gb else None
    if single:
        tensors = (
            _plan_single_from_folder(base, precision) if base.is_folder else _plan_single_from_single(base, precision)
        )
        metadata = {} if base.is_folder else _without_hashes(read_base_header(base.path).metadata)
        return OutputPlan(files=(OutputFile(name="", tensors=tensors, metadata=metadata),))
    if base.is_folder:
        return _plan_folder(base.path, shard_bytes, dict(_plan_folder_from_folder(base, base.path, precision)))
    if like is None:
        raise ConfigError(
            f"{base.path}: a single file contains no tokenizer and no configuration, which a folder needs; name a "
            "folder of the same family with --like to copy them from, or choose an output that ends in .safetensors"
        )
    template = Path(like)
    return _plan_folder(template, shard_bytes, dict(_plan_folder_from_single(base, template, precision)))


def _output_dtype(dtype: str, precision: str) -> str:
    """Return the type to write a tensor in; integer tensors, such as position ids, keep their type."""
    return precision if precision in FLOAT_TYPES and "float" in dtype else dtype


def _without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in _HASH_KEYS}


def _weight_components(folder: Path) -> tuple[str, ...]:
    """List the components whose weights are written; all others, such as a safety checker, are copied."""
    return ("unet", *text_encoder_names(folder), "vae")


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Path, str, StoredTensor]]:
    """Yield component, file, key and location of each tensor of a folder."""
    for component in _weight_components(folder):
        for file in weight_files(folder, component):
            header = read_base_header(file)
            for key, info in header.tensors.items():
                yield component, file, key, StoredTensor(file=file, info=info, data_start=header.data_start)


def _to_parameter_name(component: str, key: str) -> str:
    """Convert a key to a parameter name; newer versions of transformers omit the level `text_model`."""
    if component.startswith("text_encoder") and not key.startswith(("text_model.", "text_projection.")):
        key = f"text_model.{key}"
    return f"{component}.{key}"


def _make_source(base: Checkpoint, name: str, stored: StoredTensor) -> SourceTensor:
    return SourceTensor(stored=stored, name=name if name in base.parameters else "")


def _plan_folder_from_folder(
    base: Checkpoint, folder: Path, precision: str
) -> Iterator[tuple[tuple[Path, str], OutputTensor]]:
    """Yield each tensor of a folder with its file and key."""
    for component, file, key, stored in _stored_tensors(folder):
        dtype, shape = stored.kind
        source = _make_source(base, _to_parameter_name(component, key), stored)
        yield (file, key), OutputTensor(kind=(_output_dtype(dtype, precision), shape), parts=(source,))


def _plan_folder_from_single(
    base: Checkpoint, like: Path, precision: str
) -> Iterator[tuple[tuple[Path, str], OutputTensor]]:
    """Yield the tensors of a single file with the files and keys that they have in a folder of the same family.

    Raises:
        BaseModelError: If a tensor of the folder is missing in the single file or has another shape there.
    """
    header = read_base_header(base.path)
    vae_blocks = _count_vae_blocks(like)
    for component, file, key, template in _stored_tensors(like):
        name, (template_dtype, shape) = _to_parameter_name(component, key), template.kind
        part = ldm_key(name, base.family, base.layout, vae_blocks=vae_blocks)
        if "float" not in template_dtype:
            yield (file, key), OutputTensor(kind=template.kind, parts=(SourceTensor(stored=template),))
            continue
        info = header.tensors.get(part.key) if part else None
        if part is None or info is None:
            raise BaseModelError(
                f"{base.path}: the tensor {part.key if part else name} is missing, which {like} has; choose a folder "
                "of the same family for --like"
            )
        stored = StoredTensor(file=base.path, info=info, data_start=header.data_start, part=part)
        if math.prod(stored.kind[1]) != math.prod(shape):
            raise BaseModelError(
                f"{base.path}: {part.key} has the shape {stored.kind[1]}, but {shape} in {like}; choose a folder of "
                "the same family for --like"
            )
        kind = _output_dtype(stored.kind[0], precision), shape
        yield (file, key), OutputTensor(kind=kind, parts=(_make_source(base, name, stored),))


def _plan_folder(
    template: Path, shard_bytes: int | None, tensors: Mapping[tuple[Path, str], OutputTensor]
) -> OutputPlan:
    """Plan a folder with the weight files of a template folder, or with new shards.

    Everything except weights is copied from the template. Shard indices are copied only if the shards stay the same.
    """
    files: list[OutputFile] = []
    copies: dict[str, Path] = {"model_index.json": template / "model_index.json"}
    texts: dict[str, str] = {}
    for component in list_components(template):
        if component not in _weight_components(template):
            copies[component] = template / component
            continue
        json_files = sorted((template / component).glob("*.json"))
        sources = weight_files(template, component)
        if shard_bytes is None:
            for source in sources:
                file_tensors = {key: tensor for (file, key), tensor in tensors.items() if file == source}
                metadata = _without_hashes(read_base_header(source).metadata)
                files.append(OutputFile(name=f"{component}/{source.name}", tensors=file_tensors, metadata=metadata))
        else:
            json_files = [file for file in json_files if ".index" not in file.name]
            component_tensors = {key: tensor for (file, key), tensor in tensors.items() if file in sources}
            stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
            shards, index = _split_shards(component_tensors, shard_bytes, stem)
            files += [OutputFile(name=f"{component}/{name}", tensors=shard) for name, shard in shards.items()]
            texts |= {f"{component}/{stem}.safetensors.index.json": index} if len(shards) > 1 else {}
        copies |= {f"{component}/{file.name}": file for file in json_files}
    return OutputPlan(files=tuple(files), copies=copies, texts=texts)


def _split_shards(
    tensors: Mapping[str, OutputTensor], shard_bytes: int, stem: str
) -> tuple[dict[str, dict[str, OutputTensor]], str]:
    """Distribute tensors over files of at most `shard_bytes`, or a single larger tensor.

    Returns:
        The tensors of each file by file name, and the shard index in diffusers' JSON format.
    """
    shards: list[dict[str, OutputTensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.num_bytes
    count = len(shards)
    names = (
        [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if count > 1
        else [f"{stem}.safetensors"]
    )
    shards_by_name = dict(zip(names, shards, strict=True))
    total_size = sum(tensor.num_bytes for tensor in tensors.values())
    weight_map = {key: name for name, shard in shards_by_name.items() for key in shard}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return shards_by_name, json.dumps(index, indent=2) + "\n"


def _plan_single_from_single(base: Checkpoint, precision: str) -> dict[str, OutputTensor]:
    """Plan all tensors of a single file under the same keys, including those that no pipeline uses."""
    header = read_base_header(base.path)
    sources: dict[str, list[SourceTensor]] = {}
    for name, stored in base.parameters.items():
        sources.setdefault(stored.part.key, []).append(SourceTensor(stored=stored, name=name))
    tensors: dict[str, OutputTensor] = {}
    for key, info in header.tensors.items():
        unchanged = SourceTensor(stored=StoredTensor(file=base.path, info=info, data_start=header.data_start))
        parts = sources.get(key, [unchanged])
        transposed = parts[0].stored.part.transposed
        kind = _output_dtype(info.dtype, precision), info.shape
        tensors[key] = OutputTensor(kind=kind, parts=_order_qkv(parts), transposed=transposed)
    return tensors


def _plan_single_from_folder(base: Checkpoint, precision: str) -> dict[str, OutputTensor]:
    """Plan the tensors of a folder under the keys of the original layout; buffers without such a key are omitted."""
    vae_blocks = _count_vae_blocks(base.path)
    sources: dict[str, list[tuple[LdmKey, SourceTensor]]] = {}
    for component, _, key, stored in _stored_tensors(base.path):
        name = _to_parameter_name(component, key)
        part = ldm_key(name, base.family, base.layout, vae_blocks=vae_blocks)
        if part is not None:
            sources.setdefault(part.key, []).append((part, _make_source(base, name, stored)))
    return {key: _join_parts(key, parts, precision) for key, parts in sources.items()}


def _join_parts(key: str, parts: list[tuple[LdmKey, SourceTensor]], precision: str) -> OutputTensor:
    """Plan one tensor of a single file from the tensors of a folder that it consists of."""
    ordered = sorted(parts, key=lambda item: item[0].third or 0)
    dtype, shape = ordered[0][1].stored.kind
    if ordered[0][0].third is not None:
        if [part.third for part, _ in ordered] != [0, 1, 2]:
            raise BaseModelError(
                f"{key}: the query, key or value projection is missing; the base is incomplete, download it again"
            )
        shape = (3 * shape[0], *shape[1:])
    if ".mid.attn_1." in key and len(shape) == 2:  # the original autoencoder has 1x1 convolutions there
        shape = (*shape, 1, 1)
    transposed = ordered[0][0].transposed
    kind = _output_dtype(dtype, precision), shape[::-1] if transposed else shape
    return OutputTensor(kind=kind, parts=tuple(source for _, source in ordered), transposed=transposed)


def _order_qkv(parts: Iterable[SourceTensor]) -> tuple[SourceTensor, ...]:
    return tuple(sorted(parts, key=lambda source: source.stored.part.third or 0))


def _count_vae_blocks(folder: Path) -> int:
    """Count the down blocks of a folder's autoencoder, which has as many up blocks."""
    return len(read_json(folder / "vae" / "config.json").get("block_out_channels", (0, 0, 0, 0)))
