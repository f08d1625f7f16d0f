"""Combine adapters into one whose delta is exactly their weighted sum, by concatenating factors: ranks add up."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, Token
from lora_diffusion.adapters.blend import Blend, BlendSum, blend_sum
from lora_diffusion.adapters.compatibility import expected_shapes, is_same_weight
from lora_diffusion.adapters.deltas import compute_blended_bias
from lora_diffusion.adapters.factor_stack import Term, common_weight_shape, is_joinable, join_layers
from lora_diffusion.adapters.layers import FullLayer, Layer
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.errors import ConfigError, FamilyMismatchError


def combine(blend: Blend, metadata: AdapterMetadata, layout: ModelLayout | None = None) -> Adapter:
    """Combine the adapters of a blend into one adapter with the same delta at every module.

    Args:
        blend: Adapters with weights.
        metadata: Metadata of the new adapter.
        layout: Modules of the model; needed if a weight is set per block.

    Returns:
        The adapter. Where several LoRA layers are summed, their ranks add up and the scale is 1 (alpha = rank).

    Raises:
        ConfigError: If the layers of a module have no exact sum that can be stored, such as LoHa and LoRA, or two
            adapters define the same textual inversion token differently.
        FamilyMismatchError: If two adapters expect weights of different shapes.
    """
    summed = joint_sum(blend, layout)
    return Adapter(
        layers={path: _combine_layers(path, terms) for path, terms in summed.layers.items()},
        biases=sum_biases(summed),
        tokens=merge_tokens(blend),
        metadata=metadata,
    )


def joint_sum(blend: Blend, layout: ModelLayout | None = None) -> BlendSum:
    """Collect the weighted layers of each module that any active adapter changes, after checking their shapes.

    Args:
        blend: Adapters with weights.
        layout: Modules of the model; needed if a weight is set per block.

    Raises:
        FamilyMismatchError: If two adapters expect weights of different shapes.
        ConfigError: For weights that `blend_sum` cannot resolve.
    """
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for entry in blend.active:
        for name, shape in expected_shapes(entry.adapter).items():
            first_name, first_shape = first.setdefault(name, (entry.name, shape))
            if not is_same_weight(*sorted((shape, first_shape), key=len)):
                raise FamilyMismatchError(
                    f"{name}: has shape {first_shape} in {first_name} but {shape} in {entry.name}; "
                    "combine only adapters for the same base model"
                )
    return blend_sum(blend, layout)


def _combine_layers(path: str, terms: Sequence[Term]) -> Layer:
    """Sum the weighted layers of one module: plain LoRA by its factors, full differences entry by entry."""
    layers = [layer for _, layer in terms]
    if all(map(is_joinable, layers)):
        return join_layers(terms)
    if all(isinstance(layer, FullLayer) for layer in layers):
        return sum_full_layers(terms)
    if len(terms) > 1:
        kinds = " and ".join(sorted({layer.kind for layer in layers}))
        raise ConfigError(
            f"{path}: the sum of several {kinds} layers cannot be stored exactly; set a rank, or a fraction of the "
            "norm to keep, to approximate it with LoRA"
        )
    return _fold_weight(path, *terms[0])


def sum_full_layers(terms: Sequence[Term]) -> FullLayer:
    """Sum the weighted full differences of one module, float32."""
    shape = common_weight_shape(terms)
    deltas = (weight * layer.delta().reshape(shape) for weight, layer in terms)
    return FullLayer(diff=functools.reduce(torch.add, deltas))


def _fold_weight(path: str, weight: float, layer: Layer) -> Layer:
    """Multiply one factor of a layer by the weight: files have no field for it, and LoKr may have no alpha to scale."""
    if weight == 1:
        return layer
    if layer.kind == "DoRA":  # not linear in the weight
        raise ConfigError(
            f"{path}: a DoRA layer cannot be scaled by {weight:g} without its base model; use weight 1, or pass the "
            "base model with --base"
        )
    name = next(name for name in ("up", "w1_a", "w1") if name in layer.factors)
    return layer.with_factors({name: weight * layer.factors[name].float()})


def sum_biases(summed: BlendSum) -> dict[str, Tensor]:
    """Sum the weighted biases of each module, float32 (out,)."""
    return {path: compute_blended_bias(torch.zeros_like(terms[0][1]), terms) for path, terms in summed.biases.items()}


def merge_tokens(blend: Blend) -> dict[str, Token]:
    """Collect the textual inversion tokens of all active adapters.

    Weights do not scale embeddings: a prompt either contains a token or does not.

    Raises:
        ConfigError: If two adapters define the same token with different embeddings.
    """
    tokens: dict[str, Token] = {}
    owners: dict[str, str] = {}
    for entry in blend.active:
        for name, token in entry.adapter.tokens.items():
            if name in tokens and not _is_same_token(tokens[name], token):
                raise ConfigError(
                    f"{owners[name]} and {entry.name} both define the textual inversion token {name!r}, with different "
                    "embeddings; remove it from one of them with `lora-diffusion convert --without-tokens`"
                )
            tokens[name] = token
            owners[name] = entry.name
    return tokens


def _is_same_token(first: Token, second: Token) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[c].float(), second[c].float()) for c in first)
