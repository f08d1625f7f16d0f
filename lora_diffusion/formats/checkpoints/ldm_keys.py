"""Map diffusers keys to keys of single-file checkpoints in the original (LDM) layout.

The original layout is that of the published checkpoints: `model.diffusion_model.*` for the UNet, `first_stage_model.*`
for the VAE, transformers' names for CLIP, and open_clip's names for OpenCLIP, which stores the query, key and value
projections in one tensor [github.com/CompVis/stable-diffusion, github.com/Stability-AI/generative-models,
github.com/mlfoundations/open_clip].
"""

import re
from dataclasses import dataclass

from lora_diffusion.architectures.families import SD2, Family
from lora_diffusion.architectures.module_paths import ModelLayout

UNET = "model.diffusion_model."
"""Key prefix of the UNet."""
_VAE = "first_stage_model."
ONE_CLIP = "cond_stage_model.transformer."
"""Key prefix of the text encoder of SD 1.x (CLIP)."""
ONE_OPEN_CLIP = "cond_stage_model.model."
"""Key prefix of the text encoder of SD 2.x (OpenCLIP)."""
FIRST_CLIP = "conditioner.embedders.0.transformer."
"""Key prefix of the first text encoder of SDXL (CLIP)."""
SECOND_OPEN_CLIP = "conditioner.embedders.1.model."
"""Key prefix of the second text encoder of SDXL (OpenCLIP)."""

_RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE_NAMES = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}

_VAE_RESNETS = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
"""Attention projections of the VAE, by diffusers name: current ones and those before diffusers 0.17, still in use."""
_OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_FUSED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
"""Position of each projection in the rows of OpenCLIP's fused `in_proj`."""


@dataclass(frozen=True, kw_only=True)
class LdmKey:
    """A key of a single-file checkpoint, and the part of its tensor that a diffusers tensor corresponds to."""

    key: str
    third: int | None = None
    """Index (0, 1 or 2) of the third of the rows, for a fused `in_proj`; None for the full tensor."""
    transposed: bool = False
    """Whether the file stores (in, out) where diffusers has (out, in)."""


def ldm_key(name: str, family: Family, layout: ModelLayout, *, vae_blocks: int = 4) -> LdmKey | None:
    """Return the key of a diffusers tensor in the original layout.

    Args:
        name: `<component>.<key>`, with the key as in the component's own state dict.
        family: Family of the checkpoint.
        layout: Module layout of the checkpoint.
        vae_blocks: Number of up blocks of the VAE, which the original layout counts in reverse order.

    Returns:
        The key, or None if the original layout does not store this tensor.
    """
    component, _, inner = name.partition(".")
    if component == "unet":
        path, _, leaf = inner.rpartition(".")
        return LdmKey(key=f"{UNET}{ldm_unet_path(path, layout)}.{leaf}")
    if component == "vae":
        return LdmKey(key=_VAE + _ldm_vae_key(inner, vae_blocks))
    inner = inner if inner.startswith("text_projection") else "text_model." + inner.removeprefix("text_model.")
    if _is_open_clip(component, family):
        return _open_clip_key(ONE_OPEN_CLIP if family is SD2 else SECOND_OPEN_CLIP, inner)
    return LdmKey(key=(FIRST_CLIP if len(family.components) > 2 else ONE_CLIP) + inner)


def _is_open_clip(component: str, family: Family) -> bool:
    """Return whether a text encoder is OpenCLIP: the one of SD 2.x, or the second of SDXL."""
    return family is SD2 or component == "text_encoder_2"


def _ldm_vae_key(key: str, blocks: int) -> str:
    """Convert a key of diffusers' VAE to the original layout."""
    key = key.replace("conv_norm_out.", "norm_out.")
    if match := re.match(
        r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    ):
        side, direction, block, kind, number, rest = match.groups()
        level = int(block) if direction == "down" else blocks - 1 - int(block)
        if kind != "resnets":
            return f"{side}.{direction}.{level}.{direction}sample.{rest}"
        return f"{side}.{direction}.{level}.block.{number}.{_rename_module(rest, _VAE_RESNETS)}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        side, kind, number, rest = match.groups()
        if kind == "attentions":
            return f"{side}.mid.attn_1.{_rename_module(rest, _VAE_ATTENTION)}"
        return f"{side}.mid.block_{int(number) + 1}.{_rename_module(rest, _VAE_RESNETS)}"
    return key


def _rename_module(key: str, names: dict[str, str]) -> str:
    """Rename the module of a key `<module>.<leaf>` if `names` has an entry for it."""
    module, _, leaf = key.rpartition(".")
    return f"{names.get(module, module)}.{leaf}"


def _open_clip_key(prefix: str, key: str) -> LdmKey | None:
    """Convert a key of an OpenCLIP text encoder to the original layout; None for buffers that only transformers has."""
    if key == "text_projection.weight":
        return LdmKey(key=f"{prefix}text_projection", transposed=True)
    inner = key.removeprefix("text_model.")
    if inner in _OPEN_CLIP_TOP:
        return LdmKey(key=prefix + _OPEN_CLIP_TOP[inner])
    match = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", inner)
    if match is None:
        return None
    block, module, leaf = f"{prefix}transformer.resblocks.{match[1]}", match[2], match[3]
    if module.rpartition(".")[2] in _FUSED:
        return LdmKey(key=f"{block}.attn.in_proj_{leaf}", third=_FUSED[module.rpartition(".")[2]])
    return LdmKey(key=f"{block}.{_OPEN_CLIP_LAYER[module]}.{leaf}")


def ldm_unet_path(path: str, layout: ModelLayout) -> str:
    """Convert a UNet module path to the original layout.

    Args:
        path: diffusers module path without the component, such as `down_blocks.0.resnets.0.conv1`.
        layout: Module layout of the checkpoint.

    Returns:
        The path in the original layout, such as `input_blocks.1.0.in_layers.2`.
    """
    if path in _TOP_NAMES:
        return _TOP_NAMES[path]
    if path.startswith("mid_block."):
        kind, number, rest = path.removeprefix("mid_block.").split(".", 2)
        return f"middle_block.{_MIDDLE_NAMES[f'{kind}.{number}']}.{_ldm_inner_name(kind, rest)}"
    side, block, kind, number, rest = path.split(".", 4)
    i, j = int(block), int(number)
    per_block = layout.layers_per_block + 1
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{per_block * (i + 1)}.0.op"
        return f"input_blocks.{per_block * i + j + 1}.{int(kind == 'attentions')}.{_ldm_inner_name(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{per_block * (i + 1) - 1}.{1 + bool(layout.up_attention[i])}.conv"
    return f"output_blocks.{per_block * i + j}.{int(kind == 'attentions')}.{_ldm_inner_name(kind, rest)}"


def _ldm_inner_name(kind: str, rest: str) -> str:
    return _RESNET_NAMES[rest] if kind == "resnets" else rest
