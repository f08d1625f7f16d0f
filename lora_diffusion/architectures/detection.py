"""Which family an adapter is for, read off its module paths and the shapes of its layers."""

import re
from collections.abc import Mapping

from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.architectures.module_paths import LAYOUTS, changeable_paths

CHANNEL_LEAVES = re.compile(r"\.(attn1\.to_[qkv]|attn\d\.to_out\.0|proj_in|proj_out|conv1|conv2)$")


def is_plausible(path: str, shape: tuple[int, ...], family: str) -> bool:
    """Whether a weight of that shape can stand at that path in a base of the family.

    Only widths that tell families apart are looked at: the text context, the text encoders', the UNet blocks'.
    """
    component, inner = path.split(".", 1)
    if component != "unet":
        width = FAMILIES[family].text_widths.get(component)
        return not inner.endswith(("q_proj", "k_proj", "v_proj", "out_proj", "fc1")) or shape[1:2] == (width,)
    if inner.endswith((".attn2.to_k", ".attn2.to_v")):
        return shape[1:2] == (FAMILIES[family].context_width,)
    channels = block_channels(inner, family)
    return channels is None or CHANNEL_LEAVES.search(inner) is None or shape[0] == channels


def block_channels(inner: str, family: str) -> int | None:
    """Channels of the block that a UNet path is in; None outside the blocks."""
    widths = LAYOUTS[family].block_channels
    side, _, rest = inner.partition(".")
    if side == "mid_block":
        return widths[-1]
    number = rest.partition(".")[0]
    if side not in ("down_blocks", "up_blocks") or not number.isdecimal() or int(number) >= len(widths):
        return None
    return (widths if side == "down_blocks" else widths[::-1])[int(number)]


def candidate_families(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the families that have all of these module paths with weights of these shapes."""
    return tuple(
        family
        for family, shape in LAYOUTS.items()
        if shapes.keys() <= set(changeable_paths(shape))
        and all(is_plausible(path, weight, family) for path, weight in shapes.items())
    )


def choose_family(possible: tuple[str, ...], hint: str) -> str:
    """The one possible family, or the one that the file's own record names; an empty text if that leaves it open."""
    if len(possible) == 1:
        return possible[0]
    return hint if hint in possible else ""
