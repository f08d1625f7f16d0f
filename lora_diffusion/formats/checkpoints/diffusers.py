"""A base as a folder in diffusers' layout: which files hold its weights, what it is, and its hash."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.architectures.families import Family, detect_family
from lora_diffusion.architectures.module_paths import ModelLayout, layout_from_configs, module_paths
from lora_diffusion.core.atomic_files import file_hash
from lora_diffusion.errors import AdapterFormatError, BaseModelError
from lora_diffusion.formats.safetensors import Header, read_header

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BaseModelError if it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{path}: missing; expected a folder in diffusers' layout") from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read ({error}); the base is damaged") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: expected a JSON object; the base is damaged")
    return value


def check_is_stable_diffusion(folder: Path) -> None:
    """Raise BaseModelError unless the folder holds a Stable Diffusion pipeline in diffusers' layout."""
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder}: no model_index.json in it; expected a Stable Diffusion base in diffusers' folder layout"
        )
    check_pipeline_kind(str(folder), read_json(folder / "model_index.json").get("_class_name"))


def check_pipeline_kind(name: str, kind: object) -> None:
    """Raise BaseModelError unless a `model_index.json` names one of Stable Diffusion's pipelines."""
    if kind not in PIPELINES:
        raise BaseModelError(f"{name}: is a {kind}; expected {' or '.join(PIPELINES)} (SD 1.x, SD 2.x or SDXL)")


def list_components(folder: Path) -> tuple[str, ...]:
    """The parts of the pipeline that the folder holds, in the index's order."""
    index = read_json(folder / "model_index.json")
    return tuple(name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None)


def text_encoder_names(folder: Path) -> tuple[str, ...]:
    """The text encoders that the pipeline names, in order."""
    return tuple(name for name in ("text_encoder", "text_encoder_2") if name in list_components(folder))


def read_layout(folder: Path) -> tuple[Family, ModelLayout]:
    """Family and module layout, from the configuration files alone.

    Raises BaseModelError if they are missing, broken or not Stable Diffusion's.
    """
    unet = read_json(folder / "unet" / "config.json")
    encoders = {name: read_json(folder / name / "config.json") for name in text_encoder_names(folder)}
    try:
        family = detect_family(unet["cross_attention_dim"], two_encoders=len(encoders) == 2)
        shape = layout_from_configs(unet, encoders)
        module_paths(shape)
        return family, shape
    except BaseModelError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BaseModelError(
            f"{folder}: its UNet or text encoder is not one of Stable Diffusion's ({error!r} in config.json)"
        ) from None


def weight_files(folder: Path, component: str) -> tuple[Path, ...]:
    """The safetensors files of one component: shards by their index, else the plain file, else the fp16 variant.

    Raises BaseModelError if there are none.
    """
    part = folder / component
    for name in WEIGHT_NAMES:
        for variant in ("", ".fp16"):
            index = part / f"{name}.safetensors.index{variant}.json"
            if index.is_file():
                return list_shards(index)
            single = part / f"{name}{variant}.safetensors"
            if single.is_file():
                return (single,)
    raise BaseModelError(
        f"{part}: no .safetensors weights in it; convert .bin weights first, e.g. with "
        "DiffusionPipeline.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
    )


def list_shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names, which lie beside it."""
    table = read_json(index).get("weight_map")
    names = sorted(set(table.values())) if isinstance(table, dict) else []
    files = tuple(index.parent / name for name in names if isinstance(name, str) and Path(name).name == name)
    if not names or len(files) < len(names) or not all(file.is_file() for file in files):
        raise BaseModelError(f"{index}: does not name weight files beside it that are there; the base is incomplete")
    return files


def stored_kinds(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a base's weight file. Raises BaseModelError."""
    return {key: (slot.dtype, slot.shape) for key, slot in read_base_header(file).tensors.items()}


def read_base_header(file: Path) -> Header:
    """The header of a base's weight file. Raises BaseModelError."""
    try:
        return read_header(file)
    except AdapterFormatError as error:
        raise BaseModelError(f"{error}; the base is damaged") from None


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """Where a checkpoint folder holds a parameter."""

    file: Path
    key: str
    shape: tuple[int, ...]


def find_parameters(folder: Path, names: Iterable[str]) -> dict[str, StoredParameter]:
    """Those of the parameters (`<module path>.weight` or `.bias`) that the folder has, from the files' headers alone.

    Keys stand with and without the level `text_model`. Raises BaseModelError, AdapterFormatError for a broken file.
    """
    wanted: dict[tuple[str, str], str] = {}
    for name in names:
        component, _, inner = name.partition(".")
        wanted |= {(component, inner): name, (component, inner.removeprefix("text_model.")): name}
    found: dict[str, StoredParameter] = {}
    for component in ("unet", *text_encoder_names(folder)):
        for file in weight_files(folder, component):
            for key, slot in read_base_header(file).tensors.items():
                if (component, key) in wanted:
                    found[wanted[component, key]] = StoredParameter(file=file, key=key, shape=slot.shape)
    return found


def weight_variant(folder: Path) -> str | None:
    """diffusers' name for the kind of weight files that the folder holds."""
    return "fp16" if ".fp16." in weight_files(folder, "unet")[0].name else None


def base_hash(folder: Path) -> str:
    """SHA-256 over the weight files of UNet, text encoders and VAE, by component and content.

    Raises BaseModelError if a component has no weights.
    """
    digest = hashlib.sha256()
    for component in ("unet", *text_encoder_names(folder), "vae"):
        for path in weight_files(folder, component):
            digest.update(f"{component}:{file_hash(path)}\n".encode())
    return digest.hexdigest()
