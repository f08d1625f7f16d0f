"""Blends of adapters of all kinds, and the parameters of a base with a blend in its weights."""

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.layers import DoRALayer, FullLayer, LoHaLayer, LoKrLayer, LoRALayer
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.config.preset import Weight
from lora_diffusion.inference.in_place import (
    blended_weights,
    live_shapes,
    parameter_at,
    weight_at,
)
from lora_diffusion.models.load import Base
from tests.conftest import random_adapter

PATH = "unet.mid_block.attentions.0.proj_in"
ONE, TWO = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", PATH


def parameters(base: Base) -> dict[str, Tensor]:
    """Copy every parameter that an adapter may change."""
    names = [f"{path}.{leaf}" for path in changeable_paths(base.layout) for leaf in ("weight", "bias")]
    return {name: parameter_at(base, name).clone() for name in live_shapes(base, names)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def mixed_adapter(base: Base, seed: int) -> Adapter:
    """Create an adapter with a layer of each kind and a bias."""
    rng = torch.Generator().manual_seed(seed)
    plain = random_adapter(base, seed=seed)
    paths = sorted(path for path in plain.layers if path.startswith("unet."))[:5]
    layers = dict(plain.layers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) * 0.1

    for path, kind in zip(paths, ("loha", "lokr", "full", "dora", "lora"), strict=True):
        out, inner = weight_at(base, path).shape
        if kind == "loha":
            parts = {"w1_a": normal(out, 2), "w1_b": normal(2, inner), "w2_a": normal(out, 2), "w2_b": normal(2, inner)}
            layers[path] = LoHaLayer(**parts, alpha=1.0)
        elif kind == "lokr":
            layers[path] = LoKrLayer(w1=normal(2, 2), w2=normal(out // 2, inner // 2), alpha=1.0)
        elif kind == "full":
            layers[path] = FullLayer(diff=normal(out, inner))
        elif kind == "dora":
            inside = LoRALayer(down=normal(3, inner), up=normal(out, 3), alpha=1.5)
            layers[path] = DoRALayer(inner=inside, magnitude=normal(out, 1).abs() + 0.5)
    biases = {PATH: normal(*parameter_at(base, f"{PATH}.bias").shape)}
    return Adapter(layers=layers, biases=biases, metadata=plain.metadata)


def blend_of(*pairs: tuple[Adapter, Weight]) -> Blend:
    return Blend(entries=tuple(WeightedAdapter(adapter=adapter, weight=weight) for adapter, weight in pairs))


def fresh(base: Base, blend: Blend, denoising_step: DenoisingStep | None = None) -> dict[str, Tensor]:
    with blended_weights(base, blend, denoising_step):
        return parameters(base)
