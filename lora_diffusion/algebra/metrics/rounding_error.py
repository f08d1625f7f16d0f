"""The rounding error: how much of a delta is lost when weights or factors are rounded to another dtype.

    rounding error = |rounded - exact| / |delta|

Both are Frobenius norms over all tensors together. The error is relative to the delta of the adapter, blend or merge,
not to the weights it is added to, nor to its factors: `up` is often thousands of times smaller than `down`, so the norm
of the factors would hide its rounding. 0 means that nothing is lost, 1 that the error is as large as the delta.
"""

import math
from collections.abc import Iterable

import torch

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.factor_stack import is_joinable
from lora_diffusion.adapters.layers import DoRALayer, Layer, LoRALayer
from lora_diffusion.algebra.metrics.norms import delta_norm, frobenius_norm


def rounding_error(errors: Iterable[float], deltas: Iterable[float]) -> float:
    """Return the rounding error of several tensors together, relative to their deltas.

    Args:
        errors: Frobenius norm of `rounded - exact` for each tensor.
        deltas: Frobenius norm of the delta of each tensor.

    Returns:
        The norm of all errors divided by that of all deltas; 0 if all deltas are 0.
    """
    norm = math.hypot(*deltas)
    return math.hypot(*errors) / norm if norm else 0.0


def adapter_rounding_error(exact: Adapter, rounded: Adapter) -> float:
    """Return the rounding error of an adapter whose tensors were cast to another dtype, relative to its delta.

    Biases count like deltas. For DoRA, whose delta depends on the base, the delta of the inner LoRA counts. For an
    adapter that has only textual inversion embeddings, these are compared instead.

    Args:
        exact: The adapter before rounding.
        rounded: The same adapter with each tensor cast to another dtype.

    Returns:
        The rounding error; 0 if the adapter has no tensors or all of them are 0.
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
    errors = [delta_difference_norm(before, after) for before, after in layers]
    errors += [frobenius_norm(before.double() - after.double()) for before, after in tensors]
    deltas = [delta_norm(before) or 0.0 for before, _ in layers]
    deltas += [frobenius_norm(before) for before, _ in tensors]
    return rounding_error(errors, deltas)


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
