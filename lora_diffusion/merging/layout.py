"""What a merged checkpoint will hold: every output tensor with the parts of the base that it is made of.

Four ways: a folder as a folder, a single file as a single file, and from one layout into the other. Nothing is read
here but headers and configuration.
"""

import json
import math
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

STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Header entries that would give the merged file the base's hash."""


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """A tensor of the base, with its parameter's name if a merge may change it."""

    stored: StoredTensor
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """Parts one below the other, then transposed if need be, in the type and shape of the file to write."""

    kind: TensorKind
    parts: tuple[SourceTensor, ...]
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.kind[0]] * math.prod(self.kind[1])


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A weight file to write."""

    name: str
    """Relative to the output; empty if it is the output."""
    tensors: Mapping[str, OutputTensor]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """All files of the output: weights to compute, files and folders to copy, and texts."""

    files: tuple[OutputFile, ...]
    copies: Mapping[str, Path] = field(default_factory=dict[str, Path])
    texts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(file.num_bytes for file in self.files)


def plan_output(base: Checkpoint, *, single: bool, like: Path | None, config: MergeConfig) -> OutputPlan:
    """The plan for a folder or a single file. Raises ConfigError, BaseModelError."""
    precision = config.precision
    shard_bytes = round(config.shard_gb * 1e9) if config.shard_gb else None
    if single:
        tensors = (
            plan_single_from_single(base, precision) if not base.is_folder else plan_single_from_folder(base, precision)
        )
        own = dict(read_base_header(base.path).metadata) if not base.is_folder else {}
        return OutputPlan(files=(OutputFile(name="", tensors=tensors, metadata=without_stale(own)),))
    if base.is_folder:
        return plan_folder(base.path, shard_bytes, dict(folder_tensors(base, base.path, precision)))
    if like is None:
        raise ConfigError(
            f"{base.path}: is a single file, which has no tokenizer and no configuration; name a folder of the same "
            "family with --like to take them from, or give an output that ends in .safetensors"
        )
    return plan_folder(like, shard_bytes, dict(plan_folder_from_single(base, like, precision)))


def output_dtype(dtype: str, wanted: str) -> str:
    """The type to write a tensor in; integers, such as position ids, stay as they are."""
    return wanted if wanted in FLOAT_TYPES and "float" in dtype else dtype


def without_stale(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in STALE}


def weight_components(folder: Path) -> tuple[str, ...]:
    """The components whose weights are written; others, such as a safety checker, are copied."""
    return ("unet", *text_encoder_names(folder), "vae")


def stored_tensors(folder: Path) -> Iterator[tuple[str, Path, str, StoredTensor]]:
    """Component, file, key and place of every tensor of a folder."""
    for component in weight_components(folder):
        for file in weight_files(folder, component):
            header = read_base_header(file)
            for key, slot in header.tensors.items():
                yield component, file, key, StoredTensor(file=file, info=slot, data_start=header.data_start)


def to_pipeline_name(component: str, key: str) -> str:
    """Our name of a tensor; newer versions of transformers leave out the level `text_model`."""
    if component.startswith("text_encoder") and not key.startswith(("text_model.", "text_projection.")):
        key = f"text_model.{key}"
    return f"{component}.{key}"


def make_source(base: Checkpoint, name: str, stored: StoredTensor) -> SourceTensor:
    return SourceTensor(stored=stored, name=name if name in base.parameters else "")


def folder_tensors(base: Checkpoint, folder: Path, precision: str) -> Iterator[tuple[tuple[Path, str], OutputTensor]]:
    """Every tensor of a folder, by file and key."""
    for component, file, key, stored in stored_tensors(folder):
        dtype, shape = stored.kind
        one = make_source(base, to_pipeline_name(component, key), stored)
        yield (file, key), OutputTensor(kind=(output_dtype(dtype, precision), shape), parts=(one,))


def plan_folder_from_single(
    base: Checkpoint, like: Path, precision: str
) -> Iterator[tuple[tuple[Path, str], OutputTensor]]:
    """The tensors of a single file under the files and keys of a folder of the same family.

    Raises BaseModelError for one that the single file has not, or has in another shape.
    """
    header = read_base_header(base.path)
    for component, file, key, model in stored_tensors(like):
        name, (model_dtype, shape) = to_pipeline_name(component, key), model.kind
        place = ldm_key(name, base.family, base.layout, vae_blocks=count_vae_blocks(like))
        if "float" not in model_dtype:
            yield (file, key), OutputTensor(kind=model.kind, parts=(SourceTensor(stored=model),))
            continue
        slot = header.tensors.get(place.key) if place else None
        if place is None or slot is None:
            raise BaseModelError(
                f"{base.path}: has no {place.key if place else name}, which {like} has; give a folder of its family"
            )
        stored = StoredTensor(file=base.path, info=slot, data_start=header.data_start, part=place)
        if math.prod(stored.kind[1]) != math.prod(shape):
            raise BaseModelError(
                f"{base.path}: {place.key} is {stored.kind[1]}, but {like} has {shape}; give a folder of its family"
            )
        kind = output_dtype(stored.kind[0], precision), shape
        yield (file, key), OutputTensor(kind=kind, parts=(make_source(base, name, stored),))


def plan_folder(model: Path, shard_bytes: int | None, tensors: Mapping[tuple[Path, str], OutputTensor]) -> OutputPlan:
    """Files as the model folder has them, or cut anew into shards; everything but the weights is copied from there."""
    files: list[OutputFile] = []
    copies: dict[str, Path] = {"model_index.json": model / "model_index.json"}
    texts: dict[str, str] = {}
    for component in list_components(model):
        if component not in weight_components(model):
            copies[component] = model / component
            continue
        settings = sorted((model / component).glob("*.json"))
        sources = weight_files(model, component)
        if shard_bytes is None:
            for source in sources:
                held = {key: tensor for (file, key), tensor in tensors.items() if file == source}
                metadata = without_stale(read_base_header(source).metadata)
                files.append(OutputFile(name=f"{component}/{source.name}", tensors=held, metadata=metadata))
        else:
            settings = [file for file in settings if ".index" not in file.name]
            held = {key: tensor for (file, key), tensor in tensors.items() if file in sources}
            stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
            shards, index = split_shards(held, shard_bytes, stem)
            files += [OutputFile(name=f"{component}/{name}", tensors=inside) for name, inside in shards.items()]
            texts |= {f"{component}/{stem}.safetensors.index.json": index} if len(shards) > 1 else {}
        copies |= {f"{component}/{file.name}": file for file in settings}
    return OutputPlan(files=tuple(files), copies=copies, texts=texts)


def split_shards(
    tensors: Mapping[str, OutputTensor], shard_bytes: int, stem: str
) -> tuple[dict[str, dict[str, OutputTensor]], str]:
    """Tensors in files of at most so many bytes (or one tensor), and the index that diffusers reads."""
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
    named = dict(zip(names, shards, strict=True))
    total = sum(tensor.num_bytes for tensor in tensors.values())
    weight_map = {key: name for name, shard in named.items() for key in shard}
    return named, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def plan_single_from_single(base: Checkpoint, precision: str) -> dict[str, OutputTensor]:
    """The tensors of a single file under their own keys, those that no pipeline has included."""
    header = read_base_header(base.path)
    named: dict[str, list[SourceTensor]] = {}
    for name, stored in base.parameters.items():
        named.setdefault(stored.part.key, []).append(SourceTensor(stored=stored, name=name))
    tensors: dict[str, OutputTensor] = {}
    for key, slot in header.tensors.items():
        whole = SourceTensor(stored=StoredTensor(file=base.path, info=slot, data_start=header.data_start))
        parts = named.get(key, [whole])
        transposed = parts[0].stored.part.transposed
        kind = output_dtype(slot.dtype, precision), slot.shape
        tensors[key] = OutputTensor(kind=kind, parts=order_qkv(parts), transposed=transposed)
    return tensors


def plan_single_from_folder(base: Checkpoint, precision: str) -> dict[str, OutputTensor]:
    """The tensors of a folder under the keys of the original layout; buffers that it does not have are left out."""
    blocks = count_vae_blocks(base.path)
    grouped: dict[str, list[tuple[LdmKey, SourceTensor]]] = {}
    for component, _, key, stored in stored_tensors(base.path):
        name = to_pipeline_name(component, key)
        place = ldm_key(name, base.family, base.layout, vae_blocks=blocks)
        if place is not None:
            grouped.setdefault(place.key, []).append((place, make_source(base, name, stored)))
    return {key: join_parts(key, places, precision) for key, places in grouped.items()}


def join_parts(key: str, places: list[tuple[LdmKey, SourceTensor]], precision: str) -> OutputTensor:
    """The tensor of a single file that these parts of a folder make."""
    ordered = sorted(places, key=lambda item: item[0].third or 0)
    dtype, shape = ordered[0][1].stored.kind
    if ordered[0][0].third is not None:
        if [place.third for place, _ in ordered] != [0, 1, 2]:
            raise BaseModelError(f"{key}: one of its queries, keys and values is missing; the base is incomplete")
        shape = (3 * shape[0], *shape[1:])
    if ".mid.attn_1." in key and len(shape) == 2:  # the original autoencoder has 1x1 convolutions there
        shape = (*shape, 1, 1)
    transposed = ordered[0][0].transposed
    kind = output_dtype(dtype, precision), shape[::-1] if transposed else shape
    return OutputTensor(kind=kind, parts=tuple(one for _, one in ordered), transposed=transposed)


def order_qkv(parts: Iterable[SourceTensor]) -> tuple[SourceTensor, ...]:
    return tuple(sorted(parts, key=lambda item: item.stored.part.third or 0))


def count_vae_blocks(folder: Path) -> int:
    """How many blocks either side of a folder's autoencoder has."""
    return len(read_json(folder / "vae" / "config.json").get("block_out_channels", (0, 0, 0, 0)))
