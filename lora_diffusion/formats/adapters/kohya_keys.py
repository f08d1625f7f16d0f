"""kohya's names of modules: `lora_unet_down_blocks_0_attentions_0_..._to_q` for a module path, and back.

A name cannot be split again at its underscores, so the way back goes through the table of all paths of a family. SDXL's
UNet is named by the original checkpoint's blocks (input_blocks, middle_block, output_blocks) [github.com/kohya-ss/
sd-scripts, networks/lora.py; github.com/Stability-AI/generative-models]; files with diffusers' block names exist too.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache

from lora_diffusion.architectures.families import FAMILIES, TWO_ENCODERS
from lora_diffusion.architectures.module_paths import LAYOUTS, changeable_paths
from lora_diffusion.formats.checkpoints.ldm_keys import ldm_unet_path

UNET_PREFIX = "lora_unet"


def join_kohya_name(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def text_prefix(component: str, family: str) -> str:
    """`lora_te` for a family with one text encoder, `lora_te1` and `lora_te2` for SDXL's two."""
    if FAMILIES[family].components != TWO_ENCODERS:
        return "lora_te"
    return "lora_te2" if component == "text_encoder_2" else "lora_te1"


def kohya_name(path: str, family: str) -> str:
    """The name that kohya's own trainer gives the module at `path`. Raises KeyError for an unknown family."""
    component, inner = path.split(".", 1)
    if component != "unet":
        return join_kohya_name(text_prefix(component, family), inner)
    sgm = FAMILIES[family].components == TWO_ENCODERS
    return join_kohya_name(UNET_PREFIX, ldm_unet_path(inner, LAYOUTS[family]) if sgm else inner)


def kohya_spellings(path: str, family: str) -> Iterator[str]:
    """Every name under which files of this family hold the module at `path`, the common one first."""
    component, inner = path.split(".", 1)
    if component == "unet":
        yield kohya_name(path, family)
        yield join_kohya_name(UNET_PREFIX, inner)
        yield join_kohya_name(UNET_PREFIX, ldm_unet_path(inner, LAYOUTS[family]))
        return
    prefix = text_prefix(component, family)
    flat = inner.removeprefix("text_model.")  # written where transformers 5.6 or newer named the modules
    for name in (prefix, "lora_te1") if component == "text_encoder" else (prefix,):
        yield join_kohya_name(name, inner)
        yield join_kohya_name(name, flat)


@cache
def kohya_names(family: str) -> Mapping[str, str]:
    """Module paths by every kohya name of a family. Raises KeyError for a family without a table."""
    return {name: path for path in changeable_paths(LAYOUTS[family]) for name in kohya_spellings(path, family)}


def split_key(key: str) -> tuple[str, str]:
    """A key's module name and the name of its tensor: `lora_unet_x.lora_up.weight` -> (`lora_unet_x`, ...)."""
    name, _, leaf = key.partition(".")
    return name, leaf


def is_kohya(key: str) -> bool:
    return re.match(r"lora_(unet|te\d?)_", key) is not None
