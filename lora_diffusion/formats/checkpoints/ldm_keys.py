"""Where a single-file checkpoint in the original layout holds each tensor of a pipeline.

The layout is that of the checkpoints as they were published: `model.diffusion_model.*` for the UNet,
`first_stage_model.*` for the autoencoder, CLIP as transformers names it and OpenCLIP as its own library does, with the
projections of queries, keys and values in one tensor [github.com/CompVis/stable-diffusion, github.com/Stability-AI/
generative-models, github.com/mlfoundations/open_clip].
"""

import re
from dataclasses import dataclass

from lora_diffusion.architectures.families import SD2, Family
from lora_diffusion.architectures.module_paths import ModelLayout

UNET, VAE = "model.diffusion_model.", "first_stage_model."
ONE_CLIP, ONE_OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
FIRST_CLIP, SECOND_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE_NAMES = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}

VAE_RESNETS = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {
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
"""diffusers' names of the autoencoder's attention, today's and those of before 0.17, which files still have."""
OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
FUSED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
"""Which third of the rows of OpenCLIP's `in_proj` is whose."""


@dataclass(frozen=True, kw_only=True)
class LdmKey:
    """A key of a single-file checkpoint, and which part of its tensor is meant."""

    key: str
    third: int | None = None
    """The first, second or last third of its rows; None is all of it."""
    transposed: bool = False
    """Whether the file holds (in, out) where the pipeline has (out, in)."""


def ldm_key(name: str, family: Family, shape: ModelLayout, *, vae_blocks: int = 4) -> LdmKey | None:
    """The place of a tensor `<component>.<key in the component's own file>`; None if the layout has none for it.

    `vae_blocks` is the number of the autoencoder's blocks on each side, which the layout counts from the other end.
    """
    component, _, inner = name.partition(".")
    if component == "unet":
        path, _, leaf = inner.rpartition(".")
        return LdmKey(key=f"{UNET}{ldm_unet_path(path, shape)}.{leaf}")
    if component == "vae":
        return LdmKey(key=VAE + ldm_vae_key(inner, vae_blocks))
    inner = inner if inner.startswith("text_projection") else "text_model." + inner.removeprefix("text_model.")
    if is_open_clip(component, family):
        return open_clip_key(ONE_OPEN_CLIP if family is SD2 else SECOND_OPEN_CLIP, inner)
    return LdmKey(key=(FIRST_CLIP if len(family.components) > 2 else ONE_CLIP) + inner)


def is_open_clip(component: str, family: Family) -> bool:
    """Whether a text encoder is OpenCLIP's: that of SD 2.x, and SDXL's second."""
    return family is SD2 or component == "text_encoder_2"


def ldm_vae_key(key: str, blocks: int) -> str:
    """A key of diffusers' autoencoder in the original spelling."""
    key = key.replace("conv_norm_out.", "norm_out.")
    if match := re.match(
        r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    ):
        side, way, block, kind, number, rest = match.groups()
        level = int(block) if way == "down" else blocks - 1 - int(block)
        if kind != "resnets":
            return f"{side}.{way}.{level}.{way}sample.{rest}"
        return f"{side}.{way}.{level}.block.{number}.{rename_module(rest, VAE_RESNETS)}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        side, kind, number, rest = match.groups()
        if kind == "attentions":
            return f"{side}.mid.attn_1.{rename_module(rest, VAE_ATTENTION)}"
        return f"{side}.mid.block_{int(number) + 1}.{rename_module(rest, VAE_RESNETS)}"
    return key


def rename_module(key: str, names: dict[str, str]) -> str:
    """A key `<module>.<leaf>` with its module under another name, if it has one."""
    module, _, leaf = key.rpartition(".")
    return f"{names.get(module, module)}.{leaf}"


def open_clip_key(prefix: str, key: str) -> LdmKey | None:
    """The place of a tensor of an OpenCLIP text encoder; transformers' own buffers have none."""
    if key == "text_projection.weight":
        return LdmKey(key=f"{prefix}text_projection", transposed=True)
    inner = key.removeprefix("text_model.")
    if inner in OPEN_CLIP_TOP:
        return LdmKey(key=prefix + OPEN_CLIP_TOP[inner])
    match = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", inner)
    if match is None:
        return None
    block, module, leaf = f"{prefix}transformer.resblocks.{match[1]}", match[2], match[3]
    if module.rpartition(".")[2] in FUSED:
        return LdmKey(key=f"{block}.attn.in_proj_{leaf}", third=FUSED[module.rpartition(".")[2]])
    return LdmKey(key=f"{block}.{OPEN_CLIP_LAYER[module]}.{leaf}")


def ldm_unet_path(path: str, shape: ModelLayout) -> str:
    """A UNet module path (without its component) in the original checkpoint's spelling."""
    if path in TOP_NAMES:
        return TOP_NAMES[path]
    if path.startswith("mid_block."):
        kind, number, rest = path.removeprefix("mid_block.").split(".", 2)
        return f"middle_block.{MIDDLE_NAMES[f'{kind}.{number}']}.{ldm_inner_name(kind, rest)}"
    side, block, kind, number, rest = path.split(".", 4)
    i, j = int(block), int(number)
    per_block = shape.layers_per_block + 1
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{per_block * (i + 1)}.0.op"
        return f"input_blocks.{per_block * i + j + 1}.{int(kind == 'attentions')}.{ldm_inner_name(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{per_block * (i + 1) - 1}.{1 + bool(shape.up_attention[i])}.conv"
    return f"output_blocks.{per_block * i + j}.{int(kind == 'attentions')}.{ldm_inner_name(kind, rest)}"


def ldm_inner_name(kind: str, rest: str) -> str:
    return RESNET_NAMES[rest] if kind == "resnets" else rest
