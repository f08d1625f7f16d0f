"""Module paths of a base, computed from the numbers in its configuration.

They are never read from a loaded model, because other versions of diffusers and transformers rename modules. A path is
dotted, spelled as in diffusers, and starts with its component:
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ATTENTION_LEAVES = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION_LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """The configuration values of a base that determine its module paths."""

    block_channels: tuple[int, ...]
    """UNet channels from the highest resolution to the lowest."""
    down_attention: tuple[int, ...]
    """Transformer layers of each attention in a down block; 0 for blocks without attention."""
    up_attention: tuple[int, ...]
    """Transformer layers of each attention in an up block; 0 for blocks without attention."""
    mid_attention: int
    """Transformer layers of the attention in the middle block."""
    mid_block: bool
    """Whether there is a middle block; some distilled UNets have none."""
    layers_per_block: int
    """ResNets of a down block; an up block has one more."""
    added_embedding: bool
    """Whether there is a second time embedding, as in SDXL."""
    text_layers: Mapping[str, int]
    """Number of hidden layers of each text encoder, by component."""
    text_projections: tuple[str, ...] = ()
    """Text encoders with a projection after the last layer."""


_SD1_LAYOUT = ModelLayout(
    block_channels=(320, 640, 1280, 1280),
    down_attention=(1, 1, 1, 0),
    up_attention=(0, 1, 1, 1),
    mid_attention=1,
    mid_block=True,
    layers_per_block=2,
    added_embedding=False,
    text_layers={"text_encoder": 12},
)
LAYOUTS: Mapping[str, ModelLayout] = {
    "sd1": _SD1_LAYOUT,
    "sd2": replace(_SD1_LAYOUT, text_layers={"text_encoder": 23}),
    "sdxl": ModelLayout(
        block_channels=(320, 640, 1280),
        down_attention=(0, 2, 10),
        up_attention=(10, 2, 0),
        mid_attention=10,
        mid_block=True,
        layers_per_block=2,
        added_embedding=True,
        text_layers={"text_encoder": 12, "text_encoder_2": 32},
        text_projections=("text_encoder_2",),
    ),
    "tiny-sd": ModelLayout(
        block_channels=(48, 96, 192),
        down_attention=(1, 1, 1),
        up_attention=(1, 1, 1),
        mid_attention=1,
        mid_block=True,
        layers_per_block=1,
        added_embedding=False,
        text_layers={"text_encoder": 2},
    ),
}
"""Layouts of the published checkpoints and of the embedded base, by name of the family."""


def layout_from_configs(unet: Mapping[str, Any], text_encoders: Mapping[str, Mapping[str, Any]]) -> ModelLayout:
    """Read the layout from the configuration files of a base.

    Args:
        unet: Content of the UNet's `config.json`.
        text_encoders: Content of each text encoder's `config.json`, by component.
    """
    downs: Sequence[str] = unet["down_block_types"]
    ups: Sequence[str] = unet["up_block_types"]
    per_block = unet.get("transformer_layers_per_block", 1)
    depths = [per_block] * len(downs) if isinstance(per_block, int) else list(per_block)
    return ModelLayout(
        block_channels=tuple(unet["block_out_channels"]),
        down_attention=tuple(d if "CrossAttn" in b else 0 for b, d in zip(downs, depths, strict=True)),
        up_attention=tuple(d if "CrossAttn" in b else 0 for b, d in zip(ups, reversed(depths), strict=True)),
        mid_attention=depths[-1],
        mid_block=unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None,
        layers_per_block=unet["layers_per_block"],
        added_embedding=unet.get("addition_embed_type") == "text_time",
        text_layers={name: config["num_hidden_layers"] for name, config in text_encoders.items()},
        text_projections=tuple(
            name
            for name, config in text_encoders.items()
            if "CLIPTextModelWithProjection" in config.get("architectures", ())
        ),
    )


def module_paths(layout: ModelLayout) -> tuple[str, ...]:
    """Return the paths of all linear and convolution modules of the UNet and the text encoders."""
    paths = [f"unet.{path}" for path in _unet_paths(layout)]
    for component, num_layers in layout.text_layers.items():
        paths += [f"{component}.{path}" for path in _text_encoder_paths(num_layers)]
        if component in layout.text_projections:
            paths.append(f"{component}.text_projection")
    return tuple(paths)


def changeable_paths(layout: ModelLayout) -> tuple[str, ...]:
    """Return the paths of all modules that an adapter may change: those of `module_paths`, and the norms."""
    return module_paths(layout) + norm_paths(layout)


def norm_paths(layout: ModelLayout) -> tuple[str, ...]:
    """Return the paths of all group norms and layer norms of the UNet and the text encoders."""
    paths = list(module_paths(layout))
    resnets = [path.removesuffix(".conv1") for path in paths if path.endswith(".conv1")]
    attentions = [path.removesuffix(".proj_in") for path in paths if path.endswith(".proj_in")]
    blocks = [path.removesuffix(".attn1.to_q") for path in paths if path.endswith(".attn1.to_q")]
    layers = [path.removesuffix(".self_attn.q_proj") for path in paths if path.endswith(".self_attn.q_proj")]
    norms = [f"{path}.norm{i}" for path in resnets for i in (1, 2)]
    norms += [f"{path}.norm" for path in attentions]
    norms += [f"{path}.norm{i}" for path in blocks for i in (1, 2, 3)]
    norms += [f"{path}.layer_norm{i}" for path in layers for i in (1, 2)]
    norms += [f"{component}.text_model.final_layer_norm" for component in layout.text_layers]
    return (*norms, "unet.conv_norm_out")


def trainable_paths(layout: ModelLayout) -> tuple[str, ...]:
    """Return the paths of all linear and convolution modules that receive a gradient.

    SDXL uses the output of the second to last layer of its first text encoder, so the last layer receives none.
    """
    if len(layout.text_layers) == 1:
        return module_paths(layout)
    last = f"text_encoder.text_model.encoder.layers.{layout.text_layers['text_encoder'] - 1}."
    return tuple(path for path in module_paths(layout) if not path.startswith(last))


def _unet_paths(layout: ModelLayout) -> Iterator[str]:
    yield from ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2")
    if layout.added_embedding:
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    last = len(layout.block_channels) - 1
    for i, depth in enumerate(layout.down_attention):
        yield from _block_paths(
            f"down_blocks.{i}", layout.layers_per_block, depth, shortcuts=_down_shortcuts(layout, i)
        )
        if i < last:
            yield f"down_blocks.{i}.downsamplers.0.conv"
    if layout.mid_block:
        yield from _attention_block_paths("mid_block.attentions.0", layout.mid_attention)
        yield from _resnet_paths("mid_block.resnets.0", shortcut=False)
        yield from _resnet_paths("mid_block.resnets.1", shortcut=False)
    for i, depth in enumerate(layout.up_attention):
        count = layout.layers_per_block + 1
        yield from _block_paths(f"up_blocks.{i}", count, depth, shortcuts=range(count))
        if i < last:
            yield f"up_blocks.{i}.upsamplers.0.conv"
    yield "conv_out"


def _down_shortcuts(layout: ModelLayout, block: int) -> range:
    """Return the indices of the ResNets in a down block that change the number of channels: the first one or none."""
    channels = layout.block_channels
    return range(1) if block > 0 and channels[block] != channels[block - 1] else range(0)


def _block_paths(prefix: str, layers: int, depth: int, *, shortcuts: range) -> Iterator[str]:
    for j in range(layers):
        if depth:
            yield from _attention_block_paths(f"{prefix}.attentions.{j}", depth)
        yield from _resnet_paths(f"{prefix}.resnets.{j}", shortcut=j in shortcuts)


def _resnet_paths(prefix: str, *, shortcut: bool) -> Iterator[str]:
    yield from (f"{prefix}.conv1", f"{prefix}.time_emb_proj", f"{prefix}.conv2")
    if shortcut:
        yield f"{prefix}.conv_shortcut"


def _attention_block_paths(prefix: str, depth: int) -> Iterator[str]:
    yield f"{prefix}.proj_in"
    for k in range(depth):
        block = f"{prefix}.transformer_blocks.{k}"
        for attention in ("attn1", "attn2"):
            yield from (f"{block}.{attention}.{leaf}" for leaf in ATTENTION_LEAVES)
        yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")
    yield f"{prefix}.proj_out"


def _text_encoder_paths(num_layers: int) -> Iterator[str]:
    for i in range(num_layers):
        layer = f"text_model.encoder.layers.{i}"
        yield from (f"{layer}.self_attn.{leaf}" for leaf in _TEXT_ATTENTION_LEAVES)
        yield from (f"{layer}.mlp.fc1", f"{layer}.mlp.fc2")
