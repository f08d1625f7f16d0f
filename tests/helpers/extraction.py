"""The module that extraction tests change, and the delta of a layer by definition."""

from torch import Tensor

from lora_diffusion.adapters.layers import LoRALayer

PATH = "unet.conv_in"


def product(layer: LoRALayer) -> Tensor:
    """Return the delta by the paper's formula, float64, kernels flattened."""
    return layer.alpha / layer.rank * layer.up.double().flatten(1) @ layer.down.double().flatten(1)
