"""What a single-file checkpoint is, from the names and shapes of its tensors alone."""

import re
from collections.abc import Mapping

from lora_diffusion.architectures.families import Family, detect_family
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.errors import BaseModelError
from lora_diffusion.formats.checkpoints.ldm_keys import FIRST_CLIP, ONE_CLIP, ONE_OPEN_CLIP, SECOND_OPEN_CLIP, UNET

Shapes = Mapping[str, tuple[int, ...]]
PUBLISHED_SD2_LAYERS = 24
"""SD 2.x reads its text before the last of these; pipelines leave that one out."""


def detect_layout(shapes: Shapes, source: str) -> tuple[Family, ModelLayout]:
    """Family and module layout of a checkpoint. Raises BaseModelError if it is not Stable Diffusion's."""
    unet = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    if "input_blocks.0.0.weight" not in unet:
        first = min(shapes, default="none")
        raise BaseModelError(
            f"{source}: is no checkpoint in the original layout (it has no {UNET}input_blocks.0.0.weight; first key: "
            f"{first}); expected SD 1.x, SD 2.x or SDXL as one file, or a folder in diffusers' layout"
        )
    text_layers, projections = detect_text_encoders(shapes)
    if not text_layers:
        raise BaseModelError(f"{source}: holds a UNet without a text encoder; expected a whole checkpoint")
    downs, ups = count_resnets(unet, "input_blocks", 1), count_resnets(unet, "output_blocks", 0)
    widths = [shape[1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight")]
    if not widths or len(downs) != len(ups):
        raise BaseModelError(f"{source}: its UNet is not one of Stable Diffusion's")
    shape = ModelLayout(
        block_channels=tuple(unet[f"input_blocks.{block[0]}.0.out_layers.3.weight"][0] for block in downs),
        down_attention=tuple(transformer_depth(unet, f"input_blocks.{block[0]}") for block in downs),
        up_attention=tuple(transformer_depth(unet, f"output_blocks.{block[0]}") for block in ups),
        mid_attention=transformer_depth(unet, "middle_block"),
        mid_block=any(key.startswith("middle_block.") for key in unet),
        layers_per_block=len(downs[0]),
        added_embedding="label_emb.0.0.weight" in unet,
        text_layers=text_layers,
        text_projections=projections,
    )
    return detect_family(widths[0], two_encoders=len(text_layers) == 2), shape


def count_resnets(unet: Shapes, side: str, first: int) -> list[list[int]]:
    """The numbers of the ResNets at each resolution: an input block that samples down, or an output block that samples
    up besides, ends one."""
    blocks: list[list[int]] = [[]]
    number = first
    while any(f"{side}.{number}.{leaf}" in unet for leaf in ("0.in_layers.0.weight", "0.op.weight")):
        if f"{side}.{number}.0.op.weight" in unet:
            blocks.append([])
        else:
            blocks[-1].append(number)
            if any(f"{side}.{number}.{i}.conv.weight" in unet for i in (1, 2)):
                blocks.append([])
        number += 1
    return blocks


def transformer_depth(unet: Shapes, block: str) -> int:
    """How many transformer layers the attention of a block has; 0 if it has none."""
    return count_indices(unet, rf"{re.escape(block)}\.1\.transformer_blocks\.(\d+)\.norm1\.weight")


def count_indices(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in shapes)


def detect_text_encoders(shapes: Shapes) -> tuple[dict[str, int], tuple[str, ...]]:
    """Layers of each text encoder, by component, and those that end in a projection."""
    clip, open_clip = (
        r"text_model\.encoder\.layers\.\d+\.layer_norm1\.weight",
        r"transformer\.resblocks\.\d+\.ln_1\.weight",
    )
    second = count_indices(shapes, re.escape(SECOND_OPEN_CLIP) + open_clip)
    if second:
        first = count_indices(shapes, re.escape(FIRST_CLIP) + clip)
        return {"text_encoder": first, "text_encoder_2": second}, ("text_encoder_2",)
    layers = count_indices(shapes, re.escape(ONE_OPEN_CLIP) + open_clip)
    layers = layers - (layers == PUBLISHED_SD2_LAYERS) or count_indices(shapes, re.escape(ONE_CLIP) + clip)
    return ({"text_encoder": layers} if layers else {}), ()
