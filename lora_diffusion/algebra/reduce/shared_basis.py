"""A family of adapters as one shared basis for each module and a small private core for each adapter.

    delta_i  ~  left @ core_i @ right

`left` (out, k) and `right` (k, in) have orthonormal columns and rows and are found for all adapters together: the form
JD-Full of "Compress then Serve" [arXiv 2407.00066], by the alternation that Ye calls the generalized low-rank
approximation of matrices [Machine Learning 61, 2005]. What the adapters have in common is stored once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, Token
from lora_diffusion.adapters.factor_stack import is_joinable, join_layers
from lora_diffusion.adapters.layers import FullLayer, LoRALayer
from lora_diffusion.algebra.metrics.norms import delta_norm
from lora_diffusion.algebra.svd.svd import dense_spectrum, qr_factors, spectrum_of, truncate_spectrum
from lora_diffusion.architectures.families import family_title
from lora_diffusion.errors import ConfigError, FamilyMismatchError

Core: TypeAlias = LoRALayer | FullLayer
"""A layer in the shared coordinates, (k, k): whole, or two factors where those have fewer numbers, as of low rank."""
MOST_ROUNDS = 20
LEAST_GAIN = 1e-4
"""Rounds end when one adds to what the bases hold less than this share of what they miss."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedModule:
    """The bases that all adapters share at one module."""

    left: Tensor
    """(out, k), orthonormal columns; k is the family's rank, or less where all outputs or layers together have less."""
    right: Tensor
    """(k, in * kernel), orthonormal rows; k as for `left`, but of the inputs."""
    shape: tuple[int, ...]
    """Of the weight, (out, in[, kh, kw])."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FamilyMember:
    """What one adapter has to itself."""

    cores: Mapping[str, Core]
    """By module path; a module that the adapter does not change has none."""
    ranks: Mapping[str, int]
    """Of each core: that of the adapter's layer, or less where the bases have less."""
    error: float
    """Frobenius norm of all that is lost of its deltas over their norm, rounding to the stored type included."""
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    tokens: Mapping[str, Token] = field(default_factory=dict[str, Token])
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedFamily:
    """Adapters by name, with the bases that they share by module path."""

    modules: Mapping[str, SharedModule]
    members: Mapping[str, FamilyMember]


def share_bases(adapters: Mapping[str, Adapter], rank: int, dtype: torch.dtype = torch.float32) -> SharedFamily:
    """Adapters of plain LoRA in bases of a rank, or of less where a module or all its layers together have less.

    Each adapter counts in proportion to its own strength, so that the sum of squared relative errors is what is made
    small, module by module; the alternation finds a local optimum. Exact if `rank` is at least the sum of the
    adapters' ranks at every module. Biases and learned words are kept as they are, alphas end up in the cores. Computed
    in float64, rounded once to `dtype`. All adapters' factors are held at a time, no delta is formed. Raises
    ConfigError for no adapters, a rank below 1, layers other than plain LoRA, and modules of two shapes;
    FamilyMismatchError for adapters of several families.
    """
    if rank < 1:
        raise ConfigError(f"rank {rank}: expected at least 1")
    check_same_family(adapters)
    norms = {name: layer_norms(name, adapter) for name, adapter in adapters.items()}
    strengths = {name: math.hypot(*found.values()) for name, found in norms.items()}
    modules: dict[str, SharedModule] = {}
    cores: dict[str, dict[str, Core]] = {name: {} for name in adapters}
    ranks: dict[str, dict[str, int]] = {name: {} for name in adapters}
    lost: dict[str, list[float]] = {name: [] for name in adapters}
    for path in sorted({path for adapter in adapters.values() for path in adapter.layers}):
        layers = {name: layer for name, x in adapters.items() if isinstance(layer := x.layers.get(path), LoRALayer)}
        check_shapes(path, layers)
        modules[path] = fit_shared_module(list(layers.values()), [strengths[name] for name in layers], rank, dtype)
        for name, layer in layers.items():
            core, rank_here = project_core(layer, modules[path])
            cores[name][path], ranks[name][path] = core, rank_here
            lost[name].append(delta_distance(layer, expand_core(core, modules[path], rank_here)))
    members = {
        name: FamilyMember(
            cores=cores[name],
            ranks=ranks[name],
            error=math.hypot(*lost[name]) / strengths[name] if strengths[name] else 0.0,
            biases=adapter.biases,
            tokens=adapter.tokens,
            metadata=adapter.metadata,
        )
        for name, adapter in adapters.items()
    }
    return SharedFamily(modules=modules, members=members)


def extract_member(family: SharedFamily, name: str) -> Adapter:
    """One adapter of a family as a plain LoRA, of its own rank or, where that is less, of the family's; scale 1.

    In the type of the bases. Raises ConfigError for a name that is not in the family.
    """
    if name not in family.members:
        raise ConfigError(f"no adapter called {name!r} among the {len(family.members)} that share these factors")
    part = family.members[name]
    return Adapter(
        layers={path: expand_core(core, family.modules[path], part.ranks[path]) for path, core in part.cores.items()},
        biases=part.biases,
        tokens=part.tokens,
        metadata=part.metadata,
    )


def check_same_family(adapters: Mapping[str, Adapter]) -> None:
    """Raise ConfigError for no adapters, FamilyMismatchError for several families."""
    if not adapters:
        raise ConfigError("no adapters to share factors; give at least one")
    first: dict[str, str] = {}
    for name, adapter in adapters.items():
        first.setdefault(adapter.metadata.family, name)
    known = [(family, name) for family, name in first.items() if family]
    if len(known) > 1:
        titles = " and ".join(f"{name} is for {family_title(family)}" for family, name in known)
        raise FamilyMismatchError(f"{titles}; adapters that share factors must be of one family, pack each by itself")


def layer_norms(name: str, adapter: Adapter) -> dict[str, float]:
    """Norms of the deltas by module path. Raises ConfigError for layers other than plain LoRA."""
    odd = next((path for path, layer in adapter.layers.items() if not is_joinable(layer)), None)
    if odd is not None:
        kind = adapter.layers[odd].kind
        what = "LoRA with a Tucker core" if kind == "LoRA" else f"a {kind} layer"
        raise ConfigError(f"{name}: {odd} is {what}; only plain LoRA can share factors, leave this adapter out")
    return {path: delta_norm(layer) or 0.0 for path, layer in adapter.layers.items()}


def check_shapes(path: str, layers: Mapping[str, LoRALayer]) -> None:
    """Raise ConfigError if adapters see one module in two shapes."""
    names: dict[tuple[int, ...], str] = {}
    for name, layer in layers.items():
        names.setdefault(layer.weight_shape, name)
    if len(names) > 1:
        found = " and ".join(f"{shape} in {name}" for shape, name in names.items())
        raise ConfigError(f"{path}: has the shape {found}; adapters that share factors must be for one base")


def fit_shared_module(
    layers: Sequence[LoRALayer], strengths: Sequence[float], rank: int, dtype: torch.dtype
) -> SharedModule:
    """The bases of one module, for layers of one shape, each divided by its adapter's strength."""
    ups = [
        x.up.double().flatten(1) * (x.scale / size if size else 0.0) for x, size in zip(layers, strengths, strict=True)
    ]
    downs = [x.down.double().flatten(1) for x in layers]
    # An orthonormal basis of all columns first: the Gram matrices below are then no larger than the sum of ranks.
    left_span, right_span = qr_factors(torch.cat(ups, dim=1))[0], qr_factors(torch.cat(downs).T)[0]
    left, right = fit_bases([left_span.T @ up for up in ups], [down @ right_span for down in downs], rank)
    return SharedModule(
        left=(left_span @ left).to(dtype),
        right=(right_span @ right).T.to(dtype).contiguous(),
        shape=layers[0].weight_shape,
    )


def fit_bases(ups: Sequence[Tensor], downs: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Bases, as columns, of the outputs and the inputs, in which sum_i |left^T up_i down_i right|^2 is large.

    For a given right basis the best left one is known in closed form, and the other way round, so that no step loses.
    """
    flipped_ups, flipped_downs = [up.T for up in ups], [down.T for down in downs]
    energy = sum(float((up.T @ up).mul(down @ down.T).sum()) for up, down in zip(ups, downs, strict=True))
    left, _ = leading_columns(ups, downs, rank)
    right, held = leading_columns(flipped_downs, [up @ left for up in flipped_ups], rank)
    for _ in range(MOST_ROUNDS):
        left, _ = leading_columns(ups, [down @ right for down in downs], rank)
        right, now = leading_columns(flipped_downs, [up @ left for up in flipped_ups], rank)
        if now - held <= LEAST_GAIN * (energy - held):
            break
        held = now
    return left, right


def leading_columns(sides: Sequence[Tensor], inner: Sequence[Tensor], rank: int) -> tuple[Tensor, float]:
    """The main directions of all products side_i @ inner_i together, as columns, and the energy along them.

    From a Gram matrix in float64, whose eigenvalues are the squares of what is looked for: float32 would lose half of
    its digits, and float64 keeps those of float32.
    """
    mixed = torch.cat([side @ (other @ other.T) for side, other in zip(sides, inner, strict=True)], dim=1)
    linalg: Any = torch.linalg
    energies, vectors = linalg.eigh(mixed @ torch.cat(list(sides), dim=1).T)
    return vectors[:, -rank:].flip(1), float(energies[-rank:].sum())


def project_core(layer: LoRALayer, module: SharedModule) -> tuple[Core, int]:
    """The layer in the shared coordinates, the closest that there is in them, and its rank there."""
    inside = LoRALayer(
        up=module.left.float().T @ layer.up.float().flatten(1),
        down=layer.down.float().flatten(1) @ module.right.float().T,
        alpha=layer.alpha,
    )
    rank, dtype = min(layer.rank, *inside.weight_shape), module.left.dtype
    if is_factored(rank, inside.weight_shape):
        core = truncate_spectrum(spectrum_of([(1.0, inside)]), rank)
        return core.with_factors({name: factor.to(dtype) for name, factor in core.factors.items()}), rank
    return FullLayer(diff=inside.delta().to(dtype)), rank


def is_factored(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether two factors of a rank have no more numbers than a whole core of this shape."""
    return rank * sum(shape) <= math.prod(shape)


def expand_core(core: Core, module: SharedModule, rank: int) -> LoRALayer:
    """The layer that a core stands for, (out, in[, kh, kw]), in the type of the bases; both factors equally large."""
    pair = core if isinstance(core, LoRALayer) else truncate_spectrum(dense_spectrum(core.diff), rank)
    up, down = module.left.float() @ pair.up.float(), pair.down.float() @ module.right.float()
    ones = [1] * len(module.shape[2:])
    return LoRALayer(
        up=up.to(module.left.dtype).reshape(*up.shape, *ones),
        down=down.to(module.left.dtype).reshape(rank, *module.shape[1:]),
        alpha=float(rank),
    )


def delta_distance(layer: LoRALayer, other: LoRALayer) -> float:
    """Frobenius norm of the difference of two deltas."""
    return delta_norm(join_layers([(1.0, layer), (-1.0, other)])) or 0.0
