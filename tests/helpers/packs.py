"""Random families of adapters to be packed."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import LoRALayer

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.up_blocks.0.resnets.0.conv1"
MIDDLE = "unet.mid_block.attentions.0.proj_in"
SHAPES = {QUERY: (14, 11), CONV: (8, 3, 3, 3), MIDDLE: (9, 9)}


def new_layer(rng: torch.Generator, shape: tuple[int, ...], rank: int, alpha: float) -> LoRALayer:
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=rng)
    return LoRALayer(up=up, down=torch.randn(rank, *shape[1:], generator=rng), alpha=alpha)


def new_family(seed: int, ranks: tuple[int, ...], strengths: tuple[float, ...] = ()) -> dict[str, Adapter]:
    """Create adapters of the given ranks, the first without the convolution, the last with biases and tokens."""
    rng = torch.Generator().manual_seed(seed)
    family: dict[str, Adapter] = {}
    for number, rank in enumerate(ranks):
        paths = [path for path in SHAPES if number or path != CONV]
        alpha = strengths[number] if strengths else 1.5
        layers = {path: new_layer(rng, SHAPES[path], rank, alpha) for path in paths}
        metadata = AdapterMetadata(name=f"header {number}", family="sd1", trigger_words=(f"word{number}", "sks"))
        family[f"file-{number}"] = Adapter(layers=layers, metadata=metadata)
    tokens = {"<a.b>": {"text_encoder": torch.randn(2, 16, generator=rng)}}
    last = f"file-{len(ranks) - 1}"
    family[last] = replace(family[last], biases={CONV: torch.randn(8, generator=rng)}, tokens=tokens)
    return family


def dense(layer: Any) -> Tensor:
    """Return the delta by definition, as a float64 matrix."""
    return layer.alpha / layer.rank * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))


def true_error(before: Adapter, after: Adapter) -> float:
    lost = sum(float((dense(x) - dense(after.layers[path])).square().sum()) for path, x in before.layers.items())
    return (lost / sum(float(dense(x).square().sum()) for x in before.layers.values())) ** 0.5


families = st.builds(
    new_family,
    seed=st.integers(0, 2**31),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
)
