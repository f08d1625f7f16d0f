"""Inspect a base checkpoint in a diffusers folder: its layout, its weight files and its hash."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.architectures.families import Family, detect_family
from lora_diffusion.architectures.module_paths import ModelLayout, layout_from_configs, module_paths
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.errors import AdapterFormatError, BaseModelError
from lora_diffusion.formats.json_values import is_object
from lora_diffusion.formats.safetensors import Header, read_header

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a configuration file.

    Raises:
        BaseModelError: If the file is missing or is not a JSON object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{path}: no such file; expected a diffusers folder") from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read ({error}); expected a JSON file of a diffusers folder") from None
    if not is_object(value):
        raise BaseModelError(f"{path}: is not a JSON object; expected a configuration file of a diffusers folder")
    return value


def check_is_stable_diffusion(folder: str | os.PathLike[str]) -> None:
    """Check that a folder is a diffusers folder with a Stable Diffusion pipeline.

    Raises:
        BaseModelError: If it is not.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder}: has no model_index.json; expected a diffusers folder with a Stable Diffusion pipeline"
        )
    check_pipeline_kind(str(folder), read_json(folder / "model_index.json").get("_class_name"))


def check_pipeline_kind(name: str, kind: object) -> None:
    """Check that the pipeline class in a `model_index.json` is a Stable Diffusion pipeline.

    Args:
        name: Path or hub id of the base, for error messages.
        kind: The `_class_name` entry.

    Raises:
        BaseModelError: If it is not.
    """
    if kind not in _PIPELINES:
        raise BaseModelError(f"{name}: is a {kind}; expected {' or '.join(_PIPELINES)} (SD 1.x, SD 2.x or SDXL)")


def list_components(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the pipeline components in a diffusers folder, in the order of its `model_index.json`.

    Raises:
        BaseModelError: If `model_index.json` is missing or damaged.
    """
    index = read_json(Path(folder) / "model_index.json")
    return tuple(name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None)


def text_encoder_names(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the text encoders in a diffusers folder: `text_encoder`, and `text_encoder_2` for SDXL.

    Raises:
        BaseModelError: If `model_index.json` is missing or damaged.
    """
    return tuple(name for name in ("text_encoder", "text_encoder_2") if name in list_components(folder))


def read_layout(folder: str | os.PathLike[str]) -> tuple[Family, ModelLayout]:
    """Read the family and module layout of a diffusers folder from its configuration files.

    Raises:
        BaseModelError: If a configuration is missing, damaged, or not that of a Stable Diffusion model.
    """
    folder = Path(folder)
    unet = read_json(folder / "unet" / "config.json")
    encoders = {name: read_json(folder / name / "config.json") for name in text_encoder_names(folder)}
    try:
        family = detect_family(unet["cross_attention_dim"], two_encoders=len(encoders) == 2)
        layout = layout_from_configs(unet, encoders)
        module_paths(layout)  # raises if the configurations do not describe a Stable Diffusion model
        return family, layout
    except BaseModelError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BaseModelError(
            f"{folder}: the UNet or text encoder is not that of SD 1.x, SD 2.x or SDXL ({error!r} in config.json)"
        ) from None


def weight_files(folder: str | os.PathLike[str], component: str) -> tuple[Path, ...]:
    """Return the safetensors files with the weights of one component.

    A sharded checkpoint comes before a single file, and full-precision weights before the fp16 variant.

    Raises:
        BaseModelError: If there are none.
    """
    subfolder = Path(folder) / component
    for name in _WEIGHT_NAMES:
        for variant in ("", ".fp16"):
            index = subfolder / f"{name}.safetensors.index{variant}.json"
            if index.is_file():
                return _list_shards(index)
            single = subfolder / f"{name}{variant}.safetensors"
            if single.is_file():
                return (single,)
    raise BaseModelError(
        f"{subfolder}: has no .safetensors weights; convert .bin weights first, e.g. with "
        "DiffusionPipeline.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
    )


def _list_shards(index: Path) -> tuple[Path, ...]:
    """Return the weight files in a shard index, which are in the same folder."""
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(weight_map.values())) if is_object(weight_map) else []
    files = tuple(index.parent / name for name in names if isinstance(name, str) and Path(name).name == name)
    if not names or len(files) < len(names) or not all(file.is_file() for file in files):
        raise BaseModelError(
            f"{index}: weight files that it lists are missing from the same folder; download the base again"
        )
    return files


def read_base_header(file: str | os.PathLike[str]) -> Header:
    """Read the header of a weight file of a base.

    Raises:
        BaseModelError: If the file is missing, damaged, or not a safetensors file.
    """
    try:
        return read_header(file)
    except AdapterFormatError as error:
        raise BaseModelError(f"{error}; the base is incomplete or damaged") from None


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """The location of a parameter in a diffusers folder."""

    file: Path
    key: str
    """Key in `file`, without the component."""
    shape: tuple[int, ...]


def find_parameters(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, StoredParameter]:
    """Find parameters in the weight files of a diffusers folder, by reading only the file headers.

    Keys of text encoders match with and without `text_model.`, which transformers 5.6 dropped.

    Args:
        folder: The diffusers folder.
        names: `<module path>.weight` or `<module path>.bias`.

    Returns:
        The location of each parameter that the folder has, by name.

    Raises:
        BaseModelError: If weight files are missing or damaged.
    """
    wanted: dict[tuple[str, str], str] = {}
    for name in names:
        component, _, inner = name.partition(".")
        wanted |= {(component, inner): name, (component, inner.removeprefix("text_model.")): name}
    locations: dict[str, StoredParameter] = {}
    for component in ("unet", *text_encoder_names(folder)):
        for file in weight_files(folder, component):
            for key, info in read_base_header(file).tensors.items():
                if (component, key) in wanted:
                    locations[wanted[component, key]] = StoredParameter(file=file, key=key, shape=info.shape)
    return locations


def weight_variant(folder: str | os.PathLike[str]) -> str | None:
    """Return the `variant` to pass to diffusers' `from_pretrained`: `fp16`, or None.

    Raises:
        BaseModelError: If the UNet has no weight files.
    """
    return "fp16" if ".fp16." in weight_files(folder, "unet")[0].name else None


def base_hash(folder: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a diffusers folder: of the weight files of its UNet, text encoders and VAE.

    Configuration files and file names do not count.

    Raises:
        BaseModelError: If a component has no weights.
    """
    digest = hashlib.sha256()
    for component in ("unet", *text_encoder_names(folder), "vae"):
        for path in weight_files(folder, component):
            digest.update(f"{component}:{file_hash(path)}\n".encode())
    return digest.hexdigest()
