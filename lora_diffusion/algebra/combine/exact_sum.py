"""Many adapters as one, exactly: the factors are joined and the ranks add up."""

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
    """One adapter whose delta is the blend's at every module; where LoRA layers meet, scale is 1 (alpha = rank).

    `layout` is needed for weights by block. Raises ConfigError where layers meet that have no exact sum of a kind of
    their own, such as LoHa and LoRA, or learned words contradict each other, FamilyMismatchError as `joint_sum` does.
    """
    total = joint_sum(blend, layout)
    return Adapter(
        layers={path: combine_layers(path, terms) for path, terms in total.layers.items()},
        biases=sum_biases(total),
        tokens=merge_tokens(blend),
        metadata=metadata,
    )


def joint_sum(blend: Blend, layout: ModelLayout | None = None) -> BlendSum:
    """The blend's sum, with every module that any adapter changes.

    Raises FamilyMismatchError where two adapters are for weights of different shapes, and as `blend_sum` does.
    """
    first: dict[str, tuple[str, tuple[int, ...]]] = {}
    for entry in blend.active:
        for name, shape in expected_shapes(entry.adapter).items():
            holder, other = first.setdefault(name, (entry.name, shape))
            if not is_same_weight(*sorted((shape, other), key=len)):
                raise FamilyMismatchError(
                    f"{name}: is of shape {other} for {holder} and of shape {shape} for {entry.name}; "
                    "combine adapters of one base"
                )
    return blend_sum(blend, layout)


def combine_layers(path: str, terms: Sequence[Term]) -> Layer:
    """The weighted layers of one module as one: LoRA stacked, full differences added, any other kind if it is alone."""
    layers = [layer for _, layer in terms]
    if all(map(is_joinable, layers)):
        return join_layers(terms)
    if all(isinstance(layer, FullLayer) for layer in layers):
        return sum_full_layers(terms)
    if len(terms) > 1:
        kinds = " and ".join(sorted({layer.kind for layer in layers}))
        raise ConfigError(
            f"{path}: {kinds} layers meet there, whose sum is of neither kind; give a rank or a share to keep, "
            "and it is approximated"
        )
    return fold_weight(path, *terms[0])


def sum_full_layers(terms: Sequence[Term]) -> FullLayer:
    """Weighted full differences of one module as one, float32."""
    shape = common_weight_shape(terms)
    deltas = (weight * layer.delta().reshape(shape) for weight, layer in terms)
    return FullLayer(diff=functools.reduce(torch.add, deltas))


def fold_weight(path: str, weight: float, layer: Layer) -> Layer:
    """A lone layer with its weight in one of the factors, as no file has a place for it and LoKr's may have no alpha.

    Raises ConfigError for DoRA, which is not linear, unless the weight is 1.
    """
    if weight == 1:
        return layer
    if layer.kind == "DoRA":
        raise ConfigError(
            f"{path}: a DoRA layer times {weight:g} is no DoRA layer; use weight 1, or name its base with --base"
        )
    name = next(name for name in ("up", "w1_a", "w1") if name in layer.factors)
    return layer.with_factors({name: weight * layer.factors[name].float()})


def sum_biases(total: BlendSum) -> dict[str, Tensor]:
    """The weighted biases of each module, summed in float32."""
    return {path: compute_blended_bias(torch.zeros_like(terms[0][1]), terms) for path, terms in total.biases.items()}


def merge_tokens(blend: Blend) -> dict[str, Token]:
    """The learned words of all adapters; weights do not scale them, as a prompt names them or does not.

    Raises ConfigError if two adapters have the same word with other vectors.
    """
    words: dict[str, Token] = {}
    owners: dict[str, str] = {}
    for entry in blend.active:
        for word, token in entry.adapter.tokens.items():
            if word in words and not is_same_token(words[word], token):
                raise ConfigError(
                    f"{owners[word]} and {entry.name} both have the learned word {word!r}, with different vectors; "
                    "`lora-diffusion convert --without-tokens` makes a file without it"
                )
            words[word] = token
            owners[word] = entry.name
    return words


def is_same_token(first: Token, second: Token) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[c].float(), second[c].float()) for c in first)
