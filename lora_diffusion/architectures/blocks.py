"""Names of the blocks of a base: BASE, IN00 to IN11, M00 and OUT00 to OUT11.

These are the names of sd-webui-lora-block-weight. BASE stands for all text encoders.
"""

import re
from functools import cache

from lora_diffusion.architectures.module_paths import ModelLayout

_UNET_BLOCK = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(?:(resnets|attentions)\.(\d+)|(?:down|up)samplers)\b")


def block_name(path: str, layout: ModelLayout) -> str:
    """Return the block that contains a module.

    Args:
        path: Module path, starting with its component.
        layout: Layout of the base, which determines how the blocks are numbered.

    Returns:
        A name such as `BASE`, `IN04`, `M00` or `OUT07`; empty for the UNet's time embeddings and output layers.
    """
    if not path.startswith("unet."):
        return "BASE"
    if path.startswith("unet.conv_in"):
        return "IN00"
    if path.startswith("unet.mid_block."):
        return "M00"
    match = _UNET_BLOCK.match(path)
    if match is None:
        return ""
    side, block, _, layer = match.groups()
    each = layout.layers_per_block + 1
    if side == "down":
        return f"IN{each * int(block) + (int(layer) + 1 if layer else each):02}"
    return f"OUT{each * int(block) + (int(layer) if layer else each - 1):02}"


@cache
def _block_names(
    layers_per_block: int, down: tuple[bool, ...], up: tuple[bool, ...], *, mid_block: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all blocks and of those with attention; `down` and `up` say which levels have attention."""
    each = layers_per_block + 1
    ins = [f"IN{i:02}" for i in range(each * len(down))]
    outs = [f"OUT{i:02}" for i in range(each * len(up))]
    mid = ["M00"] if mid_block else []
    attention_ins = [f"IN{each * i + j + 1:02}" for i, has in enumerate(down) if has for j in range(layers_per_block)]
    attention_outs = [f"OUT{each * i + j:02}" for i, has in enumerate(up) if has for j in range(each)]
    return ("BASE", *ins, *mid, *outs), ("BASE", *attention_ins, *mid, *attention_outs)


def vector_block_names(layout: ModelLayout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all blocks, and of those with attention, in the order of a block vector (`lbw=`)."""
    down, up = tuple(map(bool, layout.down_attention)), tuple(map(bool, layout.up_attention))
    return _block_names(layout.layers_per_block, down, up, mid_block=layout.mid_block)


def block_prefix(path: str) -> str:
    """Return the first part of a module path that names its block.

    Returns:
        For example `unet.down_blocks.0` or `unet.mid_block`; for a text encoder, its component.
    """
    component, inner = path.split(".", 1)
    if component != "unet":
        return component
    side, _, rest = inner.partition(".")
    return f"unet.{side}.{rest.partition('.')[0]}" if side in ("down_blocks", "up_blocks") else f"unet.{side}"
