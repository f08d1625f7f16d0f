"""Relative error that casting an adapter to another dtype adds to its deltas.

The error is measured on the deltas, not on the factors: `up` is often thousands of times smaller than `down`, so the
norm of all tensors together would hide its rounding.
"""

import math

import torch

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.factor_stack import is_joinable
from lora_diffusion.adapters.layers import DoRALayer, Layer, LoRALayer
from lora_diffusion.algebra.metrics.norms import delta_norm, frobenius_norm


def rounding_error(exact: Adapter, rounded: Adapter) -> float:
    """Return the relative error of an adapter after rounding: |exact - rounded| / |exact|.

    Both are Frobenius norms over all deltas and biases. For DoRA, whose delta depends on the base, the delta of the
    inner LoRA counts. For an adapter that has only textual inversion embeddings, these are compared instead.

    Args:
        exact: The adapter before rounding.
        rounded: The same adapter with each tensor cast to another dtype.

    Returns:
        The relative error; 0 if the adapter has no tensors or all of them are 0.
    """
    if exact is rounded:
        return 0.0
    layers = [
        (_without_magnitude(layer), _without_magnitude(rounded.layers[path])) for path, layer in exact.layers.items()
    ]
    tensors = [(bias, rounded.biases[path]) for path, bias in exact.biases.items()]
    if not layers and not tensors:
        tensors = [
            (vectors, rounded.tokens[token][component])
            for token, embeddings in exact.tokens.items()
            for component, vectors in embeddings.items()
        ]
    error = math.hypot(
        *(delta_difference_norm(before, after) for before, after in layers),
        *(frobenius_norm(before.double() - after.double()) for before, after in tensors),
    )
    norm = math.hypot(
        *(delta_norm(before) or 0.0 for before, _ in layers), *(frobenius_norm(before) for before, _ in tensors)
    )
    return error / norm if norm else 0.0


def _without_magnitude(layer: Layer) -> Layer:
    return layer.inner if isinstance(layer, DoRALayer) else layer


def delta_difference_norm(before: Layer, after: Layer) -> float:
    """Return the Frobenius norm of the difference of two deltas of the same shape, rank and alpha.

    LoRA layers use up @ down - up' @ down' = (up - up') @ down + up' @ (down - down'), which has no cancellation where
    the two are close.
    """
    if not (isinstance(before, LoRALayer) and isinstance(after, LoRALayer) and is_joinable(before)):
        return frobenius_norm(before.delta() - after.delta())
    up, down, new_up, new_down = (factor.float() for factor in (before.up, before.down, after.up, after.down))
    difference = LoRALayer(
        up=torch.cat([up - new_up, new_up], dim=1), down=torch.cat([down, down - new_down]), alpha=2 * before.alpha
    )
    return delta_norm(difference) or 0.0
