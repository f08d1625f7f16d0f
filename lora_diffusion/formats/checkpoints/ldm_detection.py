"""Detect the family and layout of a single-file checkpoint from the keys and shapes of its tensors."""

import re
from collections.abc import Mapping

from lora_diffusion.architectures.families import Family, detect_family
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.errors import BaseModelError
from lora_diffusion.formats.checkpoints.ldm_keys import FIRST_CLIP, ONE_CLIP, ONE_OPEN_CLIP, SECOND_OPEN_CLIP, UNET

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor, by key."""
_PUBLISHED_SD2_LAYERS = 24
"""Text-encoder layers in published SD 2.x checkpoints. The last one is unused, and diffusers pipelines drop it."""


def detect_layout(shapes: Shapes, source: str) -> tuple[Family, ModelLayout]:
    """Detect the family and module layout of a single-file checkpoint.

    Args:
        shapes: Shape of each tensor, by key.
        source: The path of the file, for error messages.

    Raises:
        BaseModelError: If the file is not an SD 1.x, SD 2.x or SDXL checkpoint.
    """
    unet = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    if "input_blocks.0.0.weight" not in unet:
        first = min(shapes, default="none")
        raise BaseModelError(
            f"{source}: is not a checkpoint in the original layout (no key {UNET}input_blocks.0.0.weight; first key: "
            f"{first}); expected an SD 1.x, SD 2.x or SDXL checkpoint file, or a diffusers folder"
        )
    text_layers, projections = _detect_text_encoders(shapes)
    if not text_layers:
        raise BaseModelError(f"{source}: has a UNet but no text encoder; expected a full checkpoint")
    downs, ups = _count_resnets(unet, "input_blocks", 1), _count_resnets(unet, "output_blocks", 0)
    widths = [shape[1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight")]
    if not widths or len(downs) != len(ups):
        raise BaseModelError(f"{source}: its UNet is not that of SD 1.x, SD 2.x or SDXL")
    layout = ModelLayout(
        block_channels=tuple(unet[f"input_blocks.{block[0]}.0.out_layers.3.weight"][0] for block in downs),
        down_attention=tuple(_transformer_depth(unet, f"input_blocks.{block[0]}") for block in downs),
        up_attention=tuple(_transformer_depth(unet, f"output_blocks.{block[0]}") for block in ups),
        mid_attention=_transformer_depth(unet, "middle_block"),
        mid_block=any(key.startswith("middle_block.") for key in unet),
        layers_per_block=len(downs[0]),
        added_embedding="label_emb.0.0.weight" in unet,
        text_layers=text_layers,
        text_projections=projections,
    )
    return detect_family(widths[0], two_encoders=len(text_layers) == 2), layout


def _count_resnets(unet: Shapes, side: str, first: int) -> list[list[int]]:
    """Return the block numbers of the ResNets at each resolution.

    A downsampling input block, or an output block that also upsamples, ends a resolution.
    """
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


def _transformer_depth(unet: Shapes, block: str) -> int:
    """Return the number of transformer layers in a block; 0 without attention."""
    return _count_indices(unet, rf"{re.escape(block)}\.1\.transformer_blocks\.(\d+)\.norm1\.weight")


def _count_indices(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in shapes)


def _detect_text_encoders(shapes: Shapes) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the number of layers by text encoder, and the text encoders that end in a projection."""
    clip, open_clip = (
        r"text_model\.encoder\.layers\.\d+\.layer_norm1\.weight",
        r"transformer\.resblocks\.\d+\.ln_1\.weight",
    )
    second = _count_indices(shapes, re.escape(SECOND_OPEN_CLIP) + open_clip)
    if second:
        first = _count_indices(shapes, re.escape(FIRST_CLIP) + clip)
        return {"text_encoder": first, "text_encoder_2": second}, ("text_encoder_2",)
    layers = _count_indices(shapes, re.escape(ONE_OPEN_CLIP) + open_clip)
    layers = layers - (layers == _PUBLISHED_SD2_LAYERS) or _count_indices(shapes, re.escape(ONE_CLIP) + clip)
    return ({"text_encoder": layers} if layers else {}), ()
