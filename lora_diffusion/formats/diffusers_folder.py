"""A base as a folder in diffusers' layout: which files hold its weights, what it is, and its hash."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from lora_diffusion.errors import BaseModelError
from lora_diffusion.families import Anatomy, Family, anatomy, module_paths, recognise

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
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise BaseModelError(f"{folder}: is a {kind}; expected {' or '.join(PIPELINES)} (SD 1.x, SD 2.x or SDXL)")


def text_encoder_names(folder: Path) -> tuple[str, ...]:
    """The text encoders that the pipeline names, in order."""
    index = read_json(folder / "model_index.json")
    return tuple(n for n in ("text_encoder", "text_encoder_2") if (index.get(n) or [None])[0] is not None)


def anatomy_of_folder(folder: Path) -> tuple[Family, Anatomy]:
    """Family and module layout, from the configuration files alone."""
    unet = read_json(folder / "unet" / "config.json")
    encoders = {name: read_json(folder / name / "config.json") for name in text_encoder_names(folder)}
    try:
        family = recognise(unet["cross_attention_dim"], two_encoders=len(encoders) == 2)
        return family, anatomy(unet, encoders)
    except (KeyError, TypeError) as error:
        raise BaseModelError(
            f"{folder}: its UNet or text encoder is not one of Stable Diffusion's ({error!r} in config.json)"
        ) from None


def paths_of_folder(folder: Path) -> tuple[str, ...]:
    """Every module path of the base in a folder."""
    return module_paths(anatomy_of_folder(folder)[1])


def weight_files(folder: Path, component: str) -> tuple[Path, ...]:
    """The safetensors files of one component: shards by their index, else the plain file, else the fp16 variant."""
    part = folder / component
    for name in WEIGHT_NAMES:
        for variant in ("", ".fp16"):
            index = part / f"{name}.safetensors.index{variant}.json"
            if index.is_file():
                return tuple(part / shard for shard in sorted(set(read_json(index)["weight_map"].values())))
            single = part / f"{name}{variant}.safetensors"
            if single.is_file():
                return (single,)
    raise BaseModelError(
        f"{part}: no .safetensors weights in it; convert .bin weights first, e.g. with "
        "DiffusionPipeline.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
    )


def weight_variant(folder: Path) -> str | None:
    """diffusers' name for the kind of weight files that the folder holds."""
    return "fp16" if ".fp16." in weight_files(folder, "unet")[0].name else None


@cache
def base_hash(folder: Path) -> str:
    """SHA-256 over the weight files of UNet, text encoders and VAE, by component and content."""
    digest = hashlib.sha256()
    for component in ("unet", *text_encoder_names(folder), "vae"):
        for path in weight_files(folder, component):
            with path.open("rb") as file:
                digest.update(f"{component}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
