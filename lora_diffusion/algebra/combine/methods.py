"""Merge adapters by consensus methods such as TIES, DARE and ZipLoRA instead of the weighted sum.

In a weighted sum, adapters cancel each other where their deltas disagree and add up where they agree. Consensus methods
resolve such conflicts module by module. TIES, DARE, DELLA, magnitude pruning, median and SLERP work in Core Space and
KnOTS in its own coordinates (see `core_space`); ZipLoRA and NP-LoRA work on the factors.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.factor_stack import BiasTerm, is_joinable, join_layers
from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.algebra.combine.core_space import CoreSpace, build_core_space, build_knots_space, layer_from_core
from lora_diffusion.algebra.combine.exact_sum import combine, joint_sum, merge_tokens
from lora_diffusion.algebra.combine.np_lora import project_entries
from lora_diffusion.algebra.combine.ties_dare_della import dare, della, magnitude, median, slerp, ties
from lora_diffusion.algebra.combine.ziplora import zip_layers
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.combine import ConsensusConfig, ConsensusMethod
from lora_diffusion.core.seeding import make_generator
from lora_diffusion.errors import ConfigError

Terms = Sequence[tuple[float, LoRALayer]]
"""Weights and plain LoRA layers of one module."""
ModuleMethod = Callable[[Terms, ConsensusConfig, Generator], LoRALayer]
"""Merges the layers of one module."""
CoreMethod = Callable[[Tensor, Tensor, ConsensusConfig, Generator], Tensor]
"""Merges cores (n, p, q) with weights (n,) into one core (p, q)."""


def _make_core_method(build_space: Callable[[Sequence[LoRALayer]], CoreSpace], merge_cores: CoreMethod) -> ModuleMethod:
    """Wrap a function on cores so that it works on layers."""

    def merge(terms: Terms, config: ConsensusConfig, generator: Generator) -> LoRALayer:
        space = build_space([layer for _, layer in terms])
        weights = torch.tensor([weight for weight, _ in terms], dtype=torch.float64)
        return layer_from_core(space, merge_cores(space.cores, weights, config, generator))

    return merge


def _merge_cores_by_ties(cores: Tensor, weights: Tensor, config: ConsensusConfig, _: Generator) -> Tensor:
    return ties(cores, weights, density=config.density, disjoint=config.disjoint)


def _merge_cores_by_dare(cores: Tensor, weights: Tensor, config: ConsensusConfig, generator: Generator) -> Tensor:
    return dare(cores, weights, density=config.density, generator=generator)


def _merge_cores_by_della(cores: Tensor, weights: Tensor, config: ConsensusConfig, generator: Generator) -> Tensor:
    return della(
        cores, weights, density=config.density, spread=config.spread, disjoint=config.disjoint, generator=generator
    )


METHODS: Mapping[ConsensusMethod, ModuleMethod] = {
    "ties": _make_core_method(build_core_space, _merge_cores_by_ties),
    "dare": _make_core_method(build_core_space, _merge_cores_by_dare),
    "della": _make_core_method(build_core_space, _merge_cores_by_della),
    "knots": _make_core_method(build_knots_space, _merge_cores_by_ties),
    "magnitude": _make_core_method(
        build_core_space, lambda cores, weights, config, _: magnitude(cores, weights, density=config.density)
    ),
    "median": _make_core_method(build_core_space, lambda cores, weights, _, __: median(cores, weights)),
    "slerp": _make_core_method(build_core_space, lambda cores, weights, _, __: slerp(cores, weights)),
    "ziplora": lambda terms, config, _: zip_layers(terms, config.penalty),
}
"""Methods that merge one module at a time. `np-lora` needs whole adapters in the order given, so it is not listed."""


def combine_by_consensus(
    blend: Blend, config: ConsensusConfig, metadata: AdapterMetadata, layout: ModelLayout | None = None
) -> Adapter:
    """Merge the adapters of a blend by a consensus method.

    A module that only one adapter changes keeps that adapter's layer times its weight, whatever the method. Biases are
    merged like a column of the weight. Textual inversion tokens are collected as in `combine`. The result does not
    depend on the order of adapters or modules, except for `np-lora`, where the first adapter is the subject and all
    others are styles.

    Args:
        blend: Adapters with weights.
        config: The method and its settings.
        metadata: Metadata of the new adapter.
        layout: Modules of the model; needed if a weight is set per block.

    Returns:
        The merged adapter. The rank of each layer is that of the merged core, at most the sum of the ranks; `compress`
        reduces it.

    Raises:
        ConfigError: If a layer is not plain LoRA, the method does not support this number of adapters, or as
            `combine` does.
        FamilyMismatchError: If two adapters expect weights of different shapes.
    """
    _check_consensus_blend(blend, config.method)
    if config.method == "np-lora":
        entries = tuple(entry for entry in blend.entries if entry in blend.active)
        projected = Blend(entries=(project_entries(entries, config.projection_strength), *entries[1:]))
        return combine(projected, metadata, layout)
    summed = joint_sum(blend, layout)
    progress = tqdm(summed.layers.items(), desc=config.method, unit="module", leave=False, disable=None)
    return Adapter(
        layers={path: _combine_parameter(f"{path}.weight", _as_lora_terms(terms), config) for path, terms in progress},
        biases={
            path: _combine_parameter(f"{path}.bias", _biases_as_layers(terms), config).delta()[:, 0]
            for path, terms in summed.biases.items()
        },
        tokens=merge_tokens(blend),
        metadata=metadata,
    )


def _combine_parameter(name: str, terms: Terms, config: ConsensusConfig) -> LoRALayer:
    """Merge the weighted layers of one parameter; `name` seeds the random methods."""
    if len(terms) == 1:
        return join_layers(terms)
    return METHODS[config.method](terms, config, make_generator(config.seed, name))


def _as_lora_terms(terms: Sequence[tuple[float, Layer]]) -> Terms:
    """Narrow the type of layers that `_check_consensus_blend` has found to be plain LoRA."""
    return [(weight, layer) for weight, layer in terms if isinstance(layer, LoRALayer)]


def _biases_as_layers(terms: Sequence[BiasTerm]) -> Terms:
    """Represent biases as rank-1 layers with a single input."""
    return [
        (weight, LoRALayer(up=bias[:, None], down=torch.ones_like(bias[:1, None]), alpha=1)) for weight, bias in terms
    ]


def _check_consensus_blend(blend: Blend, method: ConsensusMethod) -> None:
    """Raise ConfigError if the method does not support the blend's number of adapters or kinds of layers."""
    count = len(blend.active)
    if method in ("slerp", "ziplora") and count > 2:
        raise ConfigError(f"{method} merges two adapters, but this blend has {count}; merge them in pairs")
    if method == "np-lora" and count < 2:
        raise ConfigError(f"np-lora needs two or more adapters, a subject followed by styles; this blend has {count}")
    for entry in blend.active:
        others = {path: layer.kind for path, layer in entry.adapter.layers.items() if not is_joinable(layer)}
        if others:
            kinds = ", ".join(sorted(set(others.values())))
            raise ConfigError(
                f"{entry.name}: {method} needs plain LoRA layers, but {len(others)} of {len(entry.adapter.layers)} are "
                f"{kinds} (first: {next(iter(others))}); convert the adapter with `lora-diffusion resize` first"
            )
