"""Detect the family of an adapter from its module paths and the shapes of its weights."""

import re
from collections.abc import Mapping

from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.architectures.module_paths import LAYOUTS, changeable_paths

_CHANNEL_LEAVES = re.compile(r"\.(attn1\.to_[qkv]|attn\d\.to_out\.0|proj_in|proj_out|conv1|conv2)$")


def is_plausible(path: str, shape: tuple[int, ...], family: str) -> bool:
    """Return whether the weight at a module path can have this shape in a base of the family.

    Only the widths that differ between families are compared: those of the text context, of the text encoders and of
    the UNet's blocks.

    Args:
        path: Module path.
        shape: Shape of the weight, (out, in) or (out, in, kh, kw).
        family: Name of a family.
    """
    component, inner = path.split(".", 1)
    if component != "unet":
        width = FAMILIES[family].text_widths.get(component)
        return not inner.endswith(("q_proj", "k_proj", "v_proj", "out_proj", "fc1")) or shape[1:2] == (width,)
    if inner.endswith((".attn2.to_k", ".attn2.to_v")):
        return shape[1:2] == (FAMILIES[family].context_width,)
    channels = block_channels(inner, family)
    return channels is None or _CHANNEL_LEAVES.search(inner) is None or shape[0] == channels


def block_channels(inner: str, family: str) -> int | None:
    """Return the number of channels of the block that contains a UNet module.

    Args:
        inner: Module path without `unet.`.
        family: Name of a family.

    Returns:
        The number of channels; None for modules outside the blocks.
    """
    widths = LAYOUTS[family].block_channels
    side, _, rest = inner.partition(".")
    if side == "mid_block":
        return widths[-1]
    number = rest.partition(".")[0]
    if side not in ("down_blocks", "up_blocks") or not number.isdecimal() or int(number) >= len(widths):
        return None
    return (widths if side == "down_blocks" else widths[::-1])[int(number)]


def candidate_families(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the names of the families that have all of these modules with weights of these shapes.

    Args:
        shapes: Shape of each weight, by module path.
    """
    return tuple(
        family
        for family, layout in LAYOUTS.items()
        if shapes.keys() <= set(changeable_paths(layout))
        and all(is_plausible(path, shape, family) for path, shape in shapes.items())
    )


def choose_family(candidates: tuple[str, ...], hint: str) -> str:
    """Choose the family of an adapter.

    Args:
        candidates: Families that the module paths and shapes allow.
        hint: Family that the file's metadata names; empty if it names none.

    Returns:
        The only candidate, or else the hint if it is a candidate; empty if neither decides.
    """
    if len(candidates) == 1:
        return candidates[0]
    return hint if hint in candidates else ""
