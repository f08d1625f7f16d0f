"""What a change of type does to the deltas, where the small factor of a layer counts as much as the large one."""

import math

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.factor_stack import is_joinable
from lora_diffusion.adapters.layers import DoRALayer, Layer, LoRALayer
from lora_diffusion.algebra.metrics.norms import delta_norm


def rounding_error(exact: Adapter, rounded: Adapter) -> float:
    """Norm of the change of all deltas and biases over the norm of all; of DoRA, the inner delta's."""
    layers = [(inner_layer(layer), inner_layer(rounded.layers[path])) for path, layer in exact.layers.items()]
    biases = [(bias, rounded.biases[path]) for path, bias in exact.biases.items()]
    lost = math.hypot(
        *(delta_difference_norm(*pair) for pair in layers),
        *(frobenius_norm(before - after) for before, after in biases),
    )
    whole = math.hypot(
        *(delta_norm(before) or 0.0 for before, _ in layers), *(frobenius_norm(before) for before, _ in biases)
    )
    return lost / whole if whole else 0.0


def inner_layer(layer: Layer) -> Layer:
    return layer.inner if isinstance(layer, DoRALayer) else layer


def delta_difference_norm(before: Layer, after: Layer) -> float:
    """Frobenius norm of the difference of two deltas of one shape and rank.

    up down - up' down' = (up - up') down + up' (down - down'), which loses no digits where the two are close.
    """
    if not (isinstance(before, LoRALayer) and isinstance(after, LoRALayer) and is_joinable(before)):
        return frobenius_norm(before.delta() - after.delta())
    up, down, new_up, new_down = (factor.float() for factor in (before.up, before.down, after.up, after.down))
    both = LoRALayer(
        up=torch.cat([up - new_up, new_up], dim=1), down=torch.cat([down, down - new_down]), alpha=2 * before.alpha
    )
    return delta_norm(both) or 0.0


def frobenius_norm(tensor: Tensor) -> float:
    return float(tensor.double().square().sum().sqrt())
