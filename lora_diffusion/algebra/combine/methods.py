"""Adapters as one that is no plain sum: where they disagree, a rule decides, module by module.

A blend's sum lets adapters that pull a weight both ways cancel each other, and add up where they agree. The rules here
trim, elect, drop, average robustly, turn or share instead. TIES, DARE, DELLA, magnitude pruning, median and SLERP work
in Core Space, KnOTS in coordinates of its own; ZipLoRA and NP-LoRA need the factors only.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

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
from lora_diffusion.algebra.combine.ties_dare_della import Disjoint, dare, della, magnitude, median, slerp, ties
from lora_diffusion.algebra.combine.ziplora import zip_layers
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.errors import ConfigError

Method = Literal["ties", "dare", "della", "knots", "magnitude", "median", "slerp", "zip", "project"]

OWNERS: Mapping[str, tuple[Method, ...]] = {
    "density": ("ties", "dare", "della", "knots", "magnitude"),
    "seed": ("dare", "della"),
    "spread": ("della",),
    "disjoint": ("ties", "della", "knots"),
    "penalty": ("zip",),
    "strength": ("project",),
}
"""The methods that each setting belongs to."""


@dataclass(frozen=True, kw_only=True)
class ConsensusConfig:
    """Which method makes one adapter of several, and its settings.

    Raises ConfigError for an unknown method, a value out of range, or a setting that the method has no use for.
    """

    method: Method
    density: float = 0.5
    """Share of the numbers that stay, above 0 and at most 1."""
    seed: int = 0
    """Seed of what is dropped at random."""
    spread: float = 0.2
    """How much more often small numbers are dropped than large ones, from 0, not at all, to below 1."""
    disjoint: Disjoint = "mean"
    """What becomes of the numbers that agree in sign: their mean, as strong as one adapter, or their sum."""
    penalty: float = 0.9
    """How much shared columns give way to each other, from 0, the plain sum, to below 1."""
    strength: float = 1.0
    """How strongly the others' directions are taken out of the first: 0 not at all, 1 half, large values in full."""

    def __post_init__(self) -> None:
        expected = {
            "method": (self.method in get_args(Method), f"one of {', '.join(get_args(Method))}"),
            "density": (0 < self.density <= 1, "a number above 0 and at most 1"),
            "seed": (isinstance(self.seed, int) and 0 <= self.seed < 2**62, "an integer from 0 to 2^62 - 1"),  # pyright: ignore[reportUnnecessaryIsInstance]
            "spread": (0 <= self.spread < 1, "a number from 0 to below 1"),
            "disjoint": (self.disjoint in get_args(Disjoint), "mean or sum"),
            "penalty": (0 <= self.penalty < 1, "a number from 0 to below 1"),
            "strength": (0 <= self.strength < float("inf"), "a number of at least 0"),
        }
        for name, (good, wanted) in expected.items():
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {wanted}")
        defaults = {field.name: field.default for field in fields(self)}
        for name, owners in OWNERS.items():
            if self.method not in owners and getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} belongs to {', '.join(owners)}; {self.method} has no use for it")


Terms = Sequence[tuple[float, LoRALayer]]
"""The plain LoRA layers of one module, with their weights."""
ModuleMethod = Callable[[Terms, ConsensusConfig, Generator], LoRALayer]
Rule = Callable[[Tensor, Tensor, ConsensusConfig, Generator], Tensor]


def make_core_method(space_of: Callable[[Sequence[LoRALayer]], CoreSpace], rule: Rule) -> ModuleMethod:
    """A rule on stacks of cores as a method on layers."""

    def merge(terms: Terms, how: ConsensusConfig, generator: Generator) -> LoRALayer:
        space = space_of([layer for _, layer in terms])
        weights = torch.tensor([weight for weight, _ in terms], dtype=torch.float64)
        return layer_from_core(space, rule(space.cores, weights, how, generator))

    return merge


def ties_rule(cores: Tensor, weights: Tensor, how: ConsensusConfig, _: Generator) -> Tensor:
    return ties(cores, weights, density=how.density, disjoint=how.disjoint)


def dare_rule(cores: Tensor, weights: Tensor, how: ConsensusConfig, generator: Generator) -> Tensor:
    return dare(cores, weights, density=how.density, generator=generator)


def della_rule(cores: Tensor, weights: Tensor, how: ConsensusConfig, generator: Generator) -> Tensor:
    return della(cores, weights, density=how.density, spread=how.spread, disjoint=how.disjoint, generator=generator)


METHODS: Mapping[Method, ModuleMethod] = {
    "ties": make_core_method(build_core_space, ties_rule),
    "dare": make_core_method(build_core_space, dare_rule),
    "della": make_core_method(build_core_space, della_rule),
    "knots": make_core_method(build_knots_space, ties_rule),
    "magnitude": make_core_method(
        build_core_space, lambda cores, weights, how, _: magnitude(cores, weights, density=how.density)
    ),
    "median": make_core_method(build_core_space, lambda cores, weights, _, __: median(cores, weights)),
    "slerp": make_core_method(build_core_space, lambda cores, weights, _, __: slerp(cores, weights)),
    "zip": lambda terms, how, _: zip_layers(terms, how.penalty),
}
"""The methods that see one module at a time; `project` sees whole adapters, in the order in which they were given."""


def combine_by_consensus(
    blend: Blend, how: ConsensusConfig, metadata: AdapterMetadata, layout: ModelLayout | None = None
) -> Adapter:
    """One adapter of the blend's, by a method of consensus instead of the sum; weights are those of the blend.

    A module that one adapter alone changes has nothing to agree on: it keeps that adapter's layer times its weight,
    whatever the method. Biases go through the method like a column of the weight. Learned words are united. The result
    depends on no order of adapters or modules, but for `project`, which takes the first adapter as the subject and all
    others as styles. Ranks are those of the merged cores, up to the sum of ranks; `compress` makes them smaller.
    `layout` is needed for weights by block.

    Raises ConfigError for layers other than plain LoRA, and for a number of adapters that the method is not made for,
    and as `combine` does.
    """
    check_consensus_blend(blend, how.method)
    if how.method == "project":
        entries = tuple(entry for entry in blend.entries if entry in blend.active)
        alone = Blend(entries=(project_entries(entries, how.strength), *entries[1:]))
        return combine(alone, metadata, layout)
    total = joint_sum(blend, layout)
    progress = tqdm(total.layers.items(), desc=how.method, unit="module", leave=False, disable=None)
    return Adapter(
        layers={path: combine_parameter(f"{path}.weight", as_lora_terms(terms), how) for path, terms in progress},
        biases={
            path: combine_parameter(f"{path}.bias", biases_as_layers(terms), how).delta()[:, 0]
            for path, terms in total.biases.items()
        },
        tokens=merge_tokens(blend),
        metadata=metadata,
    )


def combine_parameter(name: str, terms: Terms, how: ConsensusConfig) -> LoRALayer:
    """The weighted layers of one parameter as one."""
    if len(terms) == 1:
        return join_layers(terms)
    return METHODS[how.method](terms, how, make_generator(how.seed, name))


def make_generator(seed: int, name: str) -> Generator:
    """Random numbers for one parameter that depend on no other, so that the order of modules changes nothing."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def as_lora_terms(terms: Sequence[tuple[float, Layer]]) -> Terms:
    """Narrow the terms to plain LoRA layers, which `check_consensus_blend` has checked."""
    return [(weight, layer) for weight, layer in terms if isinstance(layer, LoRALayer)]


def biases_as_layers(terms: Sequence[BiasTerm]) -> Terms:
    """Biases as layers of rank 1 with a single input."""
    return [
        (weight, LoRALayer(up=bias[:, None], down=torch.ones_like(bias[:1, None]), alpha=1)) for weight, bias in terms
    ]


def check_consensus_blend(blend: Blend, method: Method) -> None:
    """Raise ConfigError unless the method can merge what is in the blend."""
    count = len(blend.active)
    if method in ("slerp", "zip") and count > 2:
        raise ConfigError(f"{method} merges two adapters; this blend has {count}: merge them in pairs")
    if method == "project" and count < 2:
        raise ConfigError(f"project needs a subject and, after it, at least one style; this blend has {count}")
    for entry in blend.active:
        others = {path: layer.kind for path, layer in entry.adapter.layers.items() if not is_joinable(layer)}
        if others:
            kinds = ", ".join(sorted(set(others.values())))
            raise ConfigError(
                f"{entry.name}: {len(others)} of {len(entry.adapter.layers)} layers are {kinds} and no plain LoRA "
                f"(first: {next(iter(others))}); `lora-diffusion resize` writes it as plain LoRA, which {method} needs"
            )
