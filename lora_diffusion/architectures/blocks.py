"""Blocks of a UNet by the names that users know: BASE, IN00 to IN11, M00 and OUT00 to OUT11."""

import re
from functools import cache

from lora_diffusion.architectures.module_paths import ModelLayout

UNET_BLOCK = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(?:(resnets|attentions)\.(\d+)|(?:down|up)samplers)\b")


def block_name(path: str, layout: ModelLayout) -> str:
    """The block of a module path: BASE, IN04, M00, OUT07; empty for the embeddings and the last layers of the UNet."""
    if not path.startswith("unet."):
        return "BASE"
    if path.startswith("unet.conv_in"):
        return "IN00"
    if path.startswith("unet.mid_block."):
        return "M00"
    match = UNET_BLOCK.match(path)
    if match is None:
        return ""
    side, block, _, layer = match.groups()
    each = layout.layers_per_block + 1
    if side == "down":
        return f"IN{each * int(block) + (int(layer) + 1 if layer else each):02}"
    return f"OUT{each * int(block) + (int(layer) if layer else each - 1):02}"


@cache
def block_names(shape: tuple[int, tuple[bool, ...], tuple[bool, ...], bool]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    layers, down, up, middle = shape
    each = layers + 1
    ins = [f"IN{i:02}" for i in range(each * len(down))]
    outs = [f"OUT{i:02}" for i in range(each * len(up))]
    mid = ["M00"] if middle else []
    attentive_ins = [f"IN{each * i + j + 1:02}" for i, has in enumerate(down) if has for j in range(layers)]
    attentive_outs = [f"OUT{each * i + j:02}" for i, has in enumerate(up) if has for j in range(each)]
    return ("BASE", *ins, *mid, *outs), ("BASE", *attentive_ins, *mid, *attentive_outs)


def vector_block_names(layout: ModelLayout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all blocks, and of those with attention, in the order of a block vector."""
    down, up = tuple(map(bool, layout.down_attention)), tuple(map(bool, layout.up_attention))
    return block_names((layout.layers_per_block, down, up, layout.mid_block))


def block_prefix(path: str) -> str:
    """Return the block of a module path: `unet.down_blocks.0`, `unet.mid_block`, or a whole text encoder."""
    component, inner = path.split(".", 1)
    if component != "unet":
        return component
    side, _, rest = inner.partition(".")
    return f"unet.{side}.{rest.partition('.')[0]}" if side in ("down_blocks", "up_blocks") else f"unet.{side}"
