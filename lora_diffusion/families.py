"""SD 1.x, SD 2.x and SDXL as data: components, every module path, and how to recognise one.

Module paths come from here and never from walking a live model, because library versions rename modules. A path is
dotted, in diffusers' spelling, and starts with its component:
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_diffusion.errors import BaseModelError

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION_LEAVES = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION_LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Bases between which adapters can be exchanged."""

    name: str
    """Identifier in files and recipes."""
    title: str
    """What people call it."""
    components: tuple[str, ...]
    cross_attention_dim: int | None
    """Width of the text context; None for bases of a size of their own, such as the embedded one."""
    modelspec: str
    """Architecture id of an adapter in ModelSpec 1.0.1."""
    resolution: int
    """Side of the square pictures it was trained on, in pixels."""


ONE_ENCODER = ("unet", "text_encoder")
TWO_ENCODERS = ("unet", "text_encoder", "text_encoder_2")

SD1 = Family(
    name="sd1",
    title="SD 1.x",
    components=ONE_ENCODER,
    cross_attention_dim=768,
    modelspec="stable-diffusion-v1/lora",
    resolution=512,
)
SD2 = Family(
    name="sd2",
    title="SD 2.x",
    components=ONE_ENCODER,
    cross_attention_dim=1024,
    modelspec="stable-diffusion-v2-768-v/lora",
    resolution=768,
)
SDXL = Family(
    name="sdxl",
    title="SDXL",
    components=TWO_ENCODERS,
    cross_attention_dim=2048,
    modelspec="stable-diffusion-xl-v1-base/lora",
    resolution=1024,
)
TINY_SD = Family(
    name="tiny-sd",
    title="tiny SD",
    components=ONE_ENCODER,
    cross_attention_dim=None,
    modelspec="tiny-stable-diffusion/lora",
    resolution=64,
)
TINY_SDXL = Family(
    name="tiny-sdxl",
    title="tiny SDXL",
    components=TWO_ENCODERS,
    cross_attention_dim=None,
    modelspec="tiny-stable-diffusion-xl/lora",
    resolution=64,
)

FAMILIES = {family.name: family for family in (SD1, SD2, SDXL, TINY_SD, TINY_SDXL)}


def family_title(name: str) -> str:
    """What people call a family; an unknown name is its own title."""
    return FAMILIES[name].title if name in FAMILIES else name


def recognise(cross_attention_dim: int, *, two_encoders: bool) -> Family:
    """The family of a base, from the width of its UNet's text context and the number of its text encoders.

    Raises BaseModelError if the two contradict each other.
    """
    named = {SD1.cross_attention_dim: SD1, SD2.cross_attention_dim: SD2, SDXL.cross_attention_dim: SDXL}
    family = named.get(cross_attention_dim, TINY_SDXL if two_encoders else TINY_SD)
    if (family.components == TWO_ENCODERS) != two_encoders:
        count = "two text encoders" if two_encoders else "one text encoder"
        raise BaseModelError(
            f"a UNet with text context of width {cross_attention_dim} is {family.title}, which does not have {count}; "
            f"expected the components {', '.join(family.components)}"
        )
    return family


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The numbers in a base's configuration that fix its module paths."""

    block_channels: tuple[int, ...]
    """UNet channels from the highest resolution to the lowest."""
    down_attention: tuple[int, ...]
    """Transformer layers in each attention of a down block; 0 for blocks without attention."""
    up_attention: tuple[int, ...]
    mid_attention: int
    mid_block: bool
    """Distilled UNets leave the middle block out."""
    layers_per_block: int
    added_embedding: bool
    """SDXL's second time embedding."""
    text_layers: Mapping[str, int]
    """Hidden layers of each text encoder, by component."""
    text_projections: tuple[str, ...] = ()
    """Text encoders that end in a projection."""


def anatomy(unet: Mapping[str, Any], text_encoders: Mapping[str, Mapping[str, Any]]) -> Anatomy:
    """Read from the `config.json` of a UNet and of its text encoders, by component."""
    downs: Sequence[str] = unet["down_block_types"]
    ups: Sequence[str] = unet["up_block_types"]
    per_block = unet.get("transformer_layers_per_block", 1)
    depths = [per_block] * len(downs) if isinstance(per_block, int) else list(per_block)
    return Anatomy(
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


def module_paths(shape: Anatomy) -> tuple[str, ...]:
    """Every linear and convolution module of the UNet and the text encoders, each a place for an adapter's layer."""
    paths = [f"unet.{path}" for path in unet_paths(shape)]
    for component, num_layers in shape.text_layers.items():
        paths += [f"{component}.{path}" for path in text_encoder_paths(num_layers)]
        if component in shape.text_projections:
            paths.append(f"{component}.text_projection")
    return tuple(paths)


def trainable_paths(shape: Anatomy) -> tuple[str, ...]:
    """The module paths that the loss reaches.

    SDXL reads its first text encoder before the last layer, which therefore never gets a gradient.
    """
    if len(shape.text_layers) == 1:
        return module_paths(shape)
    last = f"text_encoder.text_model.encoder.layers.{shape.text_layers['text_encoder'] - 1}."
    return tuple(path for path in module_paths(shape) if not path.startswith(last))


def unet_paths(shape: Anatomy) -> Iterator[str]:
    yield from ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2")
    if shape.added_embedding:
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    last = len(shape.block_channels) - 1
    for i, depth in enumerate(shape.down_attention):
        yield from block_paths(f"down_blocks.{i}", shape.layers_per_block, depth, shortcuts=down_shortcuts(shape, i))
        if i < last:
            yield f"down_blocks.{i}.downsamplers.0.conv"
    if shape.mid_block:
        yield from attention_block_paths("mid_block.attentions.0", shape.mid_attention)
        yield from resnet_paths("mid_block.resnets.0", shortcut=False)
        yield from resnet_paths("mid_block.resnets.1", shortcut=False)
    for i, depth in enumerate(shape.up_attention):
        count = shape.layers_per_block + 1
        yield from block_paths(f"up_blocks.{i}", count, depth, shortcuts=range(count))
        if i < last:
            yield f"up_blocks.{i}.upsamplers.0.conv"
    yield "conv_out"


def down_shortcuts(shape: Anatomy, block: int) -> range:
    """Which ResNets of a down block change the number of channels: the first, where the block is wider."""
    channels = shape.block_channels
    return range(1) if block > 0 and channels[block] != channels[block - 1] else range(0)


def block_paths(prefix: str, layers: int, depth: int, *, shortcuts: range) -> Iterator[str]:
    for j in range(layers):
        if depth:
            yield from attention_block_paths(f"{prefix}.attentions.{j}", depth)
        yield from resnet_paths(f"{prefix}.resnets.{j}", shortcut=j in shortcuts)


def resnet_paths(prefix: str, *, shortcut: bool) -> Iterator[str]:
    yield from (f"{prefix}.conv1", f"{prefix}.time_emb_proj", f"{prefix}.conv2")
    if shortcut:
        yield f"{prefix}.conv_shortcut"


def attention_block_paths(prefix: str, depth: int) -> Iterator[str]:
    yield f"{prefix}.proj_in"
    for k in range(depth):
        block = f"{prefix}.transformer_blocks.{k}"
        for attention in ("attn1", "attn2"):
            yield from (f"{block}.{attention}.{leaf}" for leaf in ATTENTION_LEAVES)
        yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")
    yield f"{prefix}.proj_out"


def text_encoder_paths(num_layers: int) -> Iterator[str]:
    for i in range(num_layers):
        layer = f"text_model.encoder.layers.{i}"
        yield from (f"{layer}.self_attn.{leaf}" for leaf in TEXT_ATTENTION_LEAVES)
        yield from (f"{layer}.mlp.fc1", f"{layer}.mlp.fc2")
