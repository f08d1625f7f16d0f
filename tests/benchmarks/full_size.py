"""UNets of Stable Diffusion's sizes with random weights, adapters for them, and two peers: a hand-written loop, and
diffusers with PEFT.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.architectures.module_paths import ATTENTION_LEAVES, LAYOUTS, module_paths
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.models.load import Base, load_base, module_at, quiet_libraries

RANK = 16
POOL = 2**24
"""So many random numbers are drawn for a UNet and used again and again."""
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def new_unet(family: str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Create a frozen UNet with the configuration of a published checkpoint."""
    with torch.device("meta"), quiet_libraries():
        unet: Any = UNet2DConditionModel(**CONFIGS[family])
        unet.to(dtype).requires_grad_(False).eval()
    unet.to_empty(device="cpu")
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for parameter in unet.parameters():
        for part in parameter.view(-1).split(POOL):
            part.copy_(pool[: part.numel()])
    return unet


def base_around(unet: UNet2DConditionModel, family: str) -> Base:
    pipe = SimpleNamespace(unet=unet)
    return Base(pipe=pipe, name=family, folder=Path(), family=FAMILIES[family], layout=LAYOUTS[family])


def attention_paths(base: Base) -> list[str]:
    """Return the paths of the UNet's attention projections."""
    leaves = tuple(f".{leaf}" for leaf in ATTENTION_LEAVES)
    return [path for path in module_paths(base.layout) if path.startswith("unet.") and path.endswith(leaves)]


def attention_weights(base: Base) -> list[Tensor]:
    """Return the weights of the attention projections, with or without PEFT's layers around them."""
    modules: list[Any] = [module_at(base, path) for path in attention_paths(base)]
    return [getattr(module, "base_layer", module).weight.data for module in modules]


def new_adapter(base: Base, seed: int, rank: int = RANK) -> Adapter:
    """Create an adapter with random float16 factors for every attention projection."""
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for path, weight in zip(attention_paths(base), attention_weights(base), strict=True):
        down = torch.randn(rank, weight.shape[1], generator=rng).mul_(0.02).half()
        up = torch.randn(weight.shape[0], rank, generator=rng).mul_(0.02).half()
        layers[path] = LoRALayer(down=down, up=up, alpha=float(rank))
    return Adapter(layers=layers, metadata=AdapterMetadata(name=f"a{seed:03}", family=base.family.name))


def write_adapters(base: Base, folder: Path, count: int) -> list[Path]:
    files = [folder / f"a{seed:03}.safetensors" for seed in range(count)]
    for seed, file in enumerate(files):
        save_adapter(new_adapter(base, seed), file)
    return files


def blend_of(adapters: Sequence[Adapter], weights: Sequence[float]) -> Blend:
    pairs = zip(adapters, weights, strict=False)
    return Blend(entries=tuple(WeightedAdapter(adapter=adapter, weight=weight) for adapter, weight in pairs))


def copy_all(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for target, value in zip(to, source, strict=True):
        target.copy_(value)


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def share_changed(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    changed = sum(int((x != y).sum()) for x, y in zip(now, before, strict=True))
    return round(changed / sum(x.numel() for x in before), 4)


def twin(base: Base) -> Base:
    """Create a second base that shares all weights except those of the attention projections, which are copied."""
    unet: Any = base.pipe.unet
    with torch.device("meta"):
        other: Any = UNet2DConditionModel.from_config(unet.config)
    own = {f"{path}.weight".removeprefix("unet.") for path in attention_paths(base)}
    state = {key: value.clone() if key in own else value for key, value in unet.state_dict().items()}
    other.load_state_dict(state, assign=True)
    return base_around(other.requires_grad_(False).eval(), base.family.name)


class ByHand:
    """A minimal blend: concatenated float32 factors with weights, and one product added to a copy of the weight."""

    def __init__(self, base: Base, adapters: Sequence[Adapter], own: Sequence[Tensor]) -> None:
        self.live, self.own = attention_weights(base), own
        self.layers: list[list[Any]] = [[a.layers[path] for a in adapters] for path in attention_paths(base)]
        self.kept = self.factors(4)

    def factors(self, count: int) -> list[tuple[Tensor, Tensor]]:
        return [self.joined(layers[:count]) for layers in self.layers]

    def joined(self, layers: Sequence[Any]) -> tuple[Tensor, Tensor]:
        return torch.cat([x.up.float() for x in layers], 1), torch.cat([x.down.float() for x in layers])

    def apply(self, weights: Sequence[float]) -> None:
        columns = torch.tensor(weights).repeat_interleave(RANK)
        for live, own, layers in zip(self.live, self.own, self.layers, strict=True):
            up, down = self.joined(layers[: len(weights)])
            live.copy_(own).addmm_(up.mul_(columns), down)

    def reweight(self, weights: Sequence[float]) -> None:
        columns = torch.tensor(weights).repeat_interleave(RANK)
        for live, own, (up, down) in zip(self.live, self.own, self.kept, strict=True):
            live.copy_(own).addmm_(up * columns, down)


def pipeline_around(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Return diffusers' pipeline with this UNet and the embedded base's other components."""
    parts = {**load_base().pipe.components, "unet": unet}
    with quiet_libraries():
        return StableDiffusionPipeline(**parts, requires_safety_checker=False)


class Peer:
    """Blending with diffusers and PEFT as documented."""

    def __init__(self, base: Base, files: Sequence[Path]) -> None:
        self.base = base
        self.files = list(files)
        self.pipe: Any = pipeline_around(base.pipe.unet)

    def load(self, index: int) -> None:
        with quiet_libraries():
            self.pipe.load_lora_weights(self.files[index], adapter_name=self.files[index].stem)

    def load_all(self) -> None:
        for index in range(len(self.files)):
            self.load(index)

    def activate(self, weights: Sequence[float]) -> None:
        """Set the weights of the first adapters, and disable the others."""
        self.pipe.set_adapters([file.stem for file in self.files[: len(weights)]], list(weights))

    def fuse(self) -> None:
        self.pipe.fuse_lora(components=["unet"])

    def unfuse(self) -> None:
        self.pipe.unfuse_lora(components=["unet"])

    def unload(self) -> None:
        self.pipe.unload_lora_weights()

    def reweight(self, weights: Sequence[float]) -> None:
        self.unfuse()
        self.activate(weights)
        self.fuse()

    def switch(self, index: int) -> None:
        self.unfuse()
        self.unload()
        self.load(index)
        self.fuse()


def peft_model(base: Base, names: Sequence[str]) -> Any:
    """Wrap the UNet in PEFT's model, which takes an adapter name per sample, with random adapters."""
    from peft import LoraConfig, get_peft_model

    targets = [path.removeprefix("unet.") for path in attention_paths(base)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(base.pipe.unet, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()
