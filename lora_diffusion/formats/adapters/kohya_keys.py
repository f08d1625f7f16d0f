"""Convert between module paths and kohya's module names, such as `lora_unet_down_blocks_0_attentions_0_..._to_q`.

A kohya name joins a module path with underscores. Names of modules contain underscores themselves, so that a kohya name
cannot be split; `kohya_names` maps all names of a family back to paths. The UNet of SDXL uses the block names of the
original checkpoint (input_blocks, middle_block, output_blocks), although files with diffusers' block names exist too
[github.com/kohya-ss/sd-scripts, networks/lora.py; github.com/Stability-AI/generative-models].
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache

from lora_diffusion.architectures.families import FAMILIES, TWO_ENCODERS
from lora_diffusion.architectures.module_paths import LAYOUTS, changeable_paths
from lora_diffusion.formats.checkpoints.ldm_keys import ldm_unet_path

_UNET_PREFIX = "lora_unet"


def _join_kohya_name(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _text_prefix(component: str, family: str) -> str:
    """Return `lora_te` for a family with one text encoder, `lora_te1` or `lora_te2` for SDXL."""
    if FAMILIES[family].components != TWO_ENCODERS:
        return "lora_te"
    return "lora_te2" if component == "text_encoder_2" else "lora_te1"


def kohya_name(path: str, family: str) -> str:
    """Return the name that kohya's trainer gives a module.

    Args:
        path: Module path, such as `unet.mid_block.attentions.0.proj_in`.
        family: Name of the family, such as `sdxl`.

    Raises:
        KeyError: If the family is unknown.
    """
    component, inner = path.split(".", 1)
    if component != "unet":
        return _join_kohya_name(_text_prefix(component, family), inner)
    sgm = FAMILIES[family].components == TWO_ENCODERS
    return _join_kohya_name(_UNET_PREFIX, ldm_unet_path(inner, LAYOUTS[family]) if sgm else inner)


def kohya_spellings(path: str, family: str) -> Iterator[str]:
    """Yield all names that files of this family use for a module, the most common one first."""
    component, inner = path.split(".", 1)
    if component == "unet":
        yield kohya_name(path, family)
        yield _join_kohya_name(_UNET_PREFIX, inner)
        yield _join_kohya_name(_UNET_PREFIX, ldm_unet_path(inner, LAYOUTS[family]))
        return
    prefix = _text_prefix(component, family)
    flat = inner.removeprefix("text_model.")  # trainers with transformers 5.6 or newer omit `text_model`
    for name in (prefix, "lora_te1") if component == "text_encoder" else (prefix,):
        yield _join_kohya_name(name, inner)
        yield _join_kohya_name(name, flat)


@cache
def kohya_names(family: str) -> Mapping[str, str]:
    """Return the module path of every kohya name in a family.

    Raises:
        KeyError: If the family has no known module layout.
    """
    return {name: path for path in changeable_paths(LAYOUTS[family]) for name in kohya_spellings(path, family)}


def split_key(key: str) -> tuple[str, str]:
    """Split `lora_unet_x.lora_up.weight` into the module name `lora_unet_x` and the leaf `lora_up.weight`."""
    name, _, leaf = key.partition(".")
    return name, leaf


def is_kohya(key: str) -> bool:
    """Return whether a key is in kohya's layout."""
    return re.match(r"lora_(unet|te\d?)_", key) is not None
