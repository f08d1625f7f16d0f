"""Store several adapters as one shared pair of bases per module and a small core per adapter.

    delta_i  ~  left @ core_i @ right

`left` (out, k) has orthonormal columns and `right` (k, in) orthonormal rows; both are fitted to all adapters together.
This is the form JD-Full of "Compress then Serve" [arXiv:2407.00066], fitted by the alternating algorithm of Ye's
generalized low-rank approximations of matrices [Machine Learning 61, 2005].
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
"""A layer's core (k, k): dense, or two factors where these have fewer numbers, as for low ranks."""

_MAX_ITERATIONS = 20
_MIN_GAIN = 1e-4
"""The iteration stops when the captured energy grows by less than this fraction of the energy not yet captured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedModule:
    """Bases that all adapters share at one module."""

    left: Tensor = field(repr=False)
    """Basis of the outputs (out, k), orthonormal columns. k is the requested rank, or less for small modules."""
    right: Tensor = field(repr=False)
    """Basis of the inputs (k, in * kh * kw), orthonormal rows; its k may differ from that of `left`."""
    shape: tuple[int, ...]
    """Shape of the weight, (out, in[, kh, kw])."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedAdapter:
    """The part of one adapter that is not shared."""

    cores: Mapping[str, Core] = field(repr=False)
    """Cores by module path, for the modules that the adapter changes."""
    ranks: Mapping[str, int] = field(repr=False)
    """Rank of each core by module path: that of the adapter's layer, or less if the bases are smaller."""
    error: float
    """Relative error: Frobenius norm of the differences of all deltas over that of the deltas, rounding included."""
    biases: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    """Biases (out,) by module path."""
    tokens: Mapping[str, Token] = field(default_factory=dict[str, Token], repr=False)
    """Textual inversion embeddings by token."""
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    """Metadata of the original adapter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterPack:
    """Several adapters stored with shared bases."""

    modules: Mapping[str, SharedModule] = field(repr=False)
    """Shared bases by module path."""
    adapters: Mapping[str, PackedAdapter]
    """The parts that are not shared, by adapter name."""


def share_bases(adapters: Mapping[str, Adapter], rank: int, dtype: torch.dtype = torch.float32) -> AdapterPack:
    """Fit shared bases to several adapters.

    The fit minimizes, module by module, the sum of squared errors of the deltas, each relative to the norm of all
    deltas of its adapter, so strong and weak adapters count alike. The alternating algorithm finds a local optimum. The
    result is exact if `rank` is at least the sum of the adapters' ranks at every module. The bases are fitted in
    float64. The factors of all adapters are held in memory; dense deltas are never formed.

    Args:
        adapters: Adapters of plain LoRA layers by name. Biases and textual inversion tokens are kept unchanged.
        rank: Number of shared directions per module; less where the module, or all its layers together, have less.
        dtype: Dtype of bases and cores.

    Raises:
        ConfigError: If there are no adapters, the rank is below 1, a layer is not plain LoRA, or a module has different
            shapes in two adapters.
        FamilyMismatchError: If the adapters are for different model families.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; expected an integer of at least 1")
    _check_same_family(adapters)
    strengths = {name: math.hypot(*_delta_norms(name, adapter).values()) for name, adapter in adapters.items()}
    modules: dict[str, SharedModule] = {}
    cores: dict[str, dict[str, Core]] = {name: {} for name in adapters}
    ranks: dict[str, dict[str, int]] = {name: {} for name in adapters}
    lost: dict[str, list[float]] = {name: [] for name in adapters}
    for path in sorted({path for adapter in adapters.values() for path in adapter.layers}):
        layers = {
            name: layer
            for name, adapter in adapters.items()
            if isinstance(layer := adapter.layers.get(path), LoRALayer)
        }
        _check_shapes(path, layers)
        modules[path] = _fit_shared_module(list(layers.values()), [strengths[name] for name in layers], rank, dtype)
        for name, layer in layers.items():
            core, core_rank = _project_core(layer, modules[path])
            cores[name][path], ranks[name][path] = core, core_rank
            lost[name].append(_delta_distance(layer, _expand_core(core, modules[path], core_rank)))
    packed = {
        name: PackedAdapter(
            cores=cores[name],
            ranks=ranks[name],
            error=math.hypot(*lost[name]) / strengths[name] if strengths[name] else 0.0,
            biases=adapter.biases,
            tokens=adapter.tokens,
            metadata=adapter.metadata,
        )
        for name, adapter in adapters.items()
    }
    return AdapterPack(modules=modules, adapters=packed)


def unpack_adapter(pack: AdapterPack, name: str) -> Adapter:
    """Restore one adapter as plain LoRA in the dtype of the bases.

    Args:
        pack: Adapters with shared bases.
        name: Name of the adapter.

    Returns:
        The adapter with scale 1 (alpha = rank). Each rank is the original one, or that of the bases if lower.

    Raises:
        ConfigError: If there is no adapter of this name.
    """
    if name not in pack.adapters:
        raise ConfigError(f"no adapter named {name!r} among the {len(pack.adapters)} adapters with these shared bases")
    packed = pack.adapters[name]
    return Adapter(
        layers={
            path: _expand_core(core, pack.modules[path], packed.ranks[path]) for path, core in packed.cores.items()
        },
        biases=packed.biases,
        tokens=packed.tokens,
        metadata=packed.metadata,
    )


def _check_same_family(adapters: Mapping[str, Adapter]) -> None:
    """Raise ConfigError if there are no adapters, FamilyMismatchError if they are for different model families."""
    if not adapters:
        raise ConfigError("no adapters to share bases; pass at least one")
    first: dict[str, str] = {}
    for name, adapter in adapters.items():
        first.setdefault(adapter.metadata.family, name)
    known = [(family, name) for family, name in first.items() if family]
    if len(known) > 1:
        titles = " and ".join(f"{name} is for {family_title(family)}" for family, name in known)
        raise FamilyMismatchError(
            f"{titles}; shared bases need adapters for one model family, pack each family separately"
        )


def _delta_norms(name: str, adapter: Adapter) -> dict[str, float]:
    """Return the delta norms by module path; raise ConfigError for layers other than plain LoRA."""
    unsupported = next((path for path, layer in adapter.layers.items() if not is_joinable(layer)), None)
    if unsupported is not None:
        kind = adapter.layers[unsupported].kind
        description = "LoRA with a Tucker core" if kind == "LoRA" else f"a {kind} layer"
        raise ConfigError(
            f"{name}: {unsupported} is {description}; only plain LoRA can share bases, leave this adapter out"
        )
    return {path: delta_norm(layer) or 0.0 for path, layer in adapter.layers.items()}


def _check_shapes(path: str, layers: Mapping[str, LoRALayer]) -> None:
    """Raise ConfigError if a module has different shapes in two adapters."""
    names: dict[tuple[int, ...], str] = {}
    for name, layer in layers.items():
        names.setdefault(layer.weight_shape, name)
    if len(names) > 1:
        shapes = " and ".join(f"{shape} in {name}" for shape, name in names.items())
        raise ConfigError(f"{path}: has shape {shapes}; shared bases need adapters for the same base model")


def _fit_shared_module(
    layers: Sequence[LoRALayer], strengths: Sequence[float], rank: int, dtype: torch.dtype
) -> SharedModule:
    """Fit the bases of one module to layers of the same shape, each divided by its adapter's strength."""
    ups = [
        layer.up.double().flatten(1) * (layer.scale / strength if strength else 0.0)
        for layer, strength in zip(layers, strengths, strict=True)
    ]
    downs = [layer.down.double().flatten(1) for layer in layers]
    # Projecting onto an orthonormal basis of all columns keeps the Gram matrices as small as the sum of ranks.
    left_span, right_span = qr_factors(torch.cat(ups, dim=1))[0], qr_factors(torch.cat(downs).T)[0]
    left, right = _fit_bases([left_span.T @ up for up in ups], [down @ right_span for down in downs], rank)
    return SharedModule(
        left=(left_span @ left).to(dtype),
        right=(right_span @ right).T.to(dtype).contiguous(),
        shape=layers[0].weight_shape,
    )


def _fit_bases(ups: Sequence[Tensor], downs: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Fit bases of outputs and inputs, as columns, that maximize sum_i |left^T up_i down_i right|_F^2.

    Given one basis, the optimal other one is known in closed form, so the objective never decreases.
    """
    flipped_ups, flipped_downs = [up.T for up in ups], [down.T for down in downs]
    energy = sum(float((up.T @ up).mul(down @ down.T).sum()) for up, down in zip(ups, downs, strict=True))
    left, _ = _leading_columns(ups, downs, rank)
    right, captured = _leading_columns(flipped_downs, [up @ left for up in flipped_ups], rank)
    for _ in range(_MAX_ITERATIONS):
        left, _ = _leading_columns(ups, [down @ right for down in downs], rank)
        right, new_captured = _leading_columns(flipped_downs, [up @ left for up in flipped_ups], rank)
        if new_captured - captured <= _MIN_GAIN * (energy - captured):
            break
        captured = new_captured
    return left, right


def _leading_columns(sides: Sequence[Tensor], inner: Sequence[Tensor], rank: int) -> tuple[Tensor, float]:
    """Return the leading left singular vectors of all side_i @ inner_i, concatenated, and the energy in them.

    Computed from a Gram matrix, whose eigenvalues are the squared singular values. That halves the number of accurate
    digits, so it needs float64 to be accurate to float32 precision.
    """
    mixed = torch.cat([side @ (other @ other.T) for side, other in zip(sides, inner, strict=True)], dim=1)
    linalg: Any = torch.linalg
    energies, vectors = linalg.eigh(mixed @ torch.cat(list(sides), dim=1).T)
    return vectors[:, -rank:].flip(1), float(energies[-rank:].sum())


def _project_core(layer: LoRALayer, module: SharedModule) -> tuple[Core, int]:
    """Project a layer onto the shared bases; return the core, which is optimal for these bases, and its rank."""
    projected = LoRALayer(
        up=module.left.float().T @ layer.up.float().flatten(1),
        down=layer.down.float().flatten(1) @ module.right.float().T,
        alpha=layer.alpha,
    )
    rank, dtype = min(layer.rank, *projected.weight_shape), module.left.dtype
    if is_factored(rank, projected.weight_shape):
        core = truncate_spectrum(spectrum_of([(1.0, projected)]), rank)
        return core.with_factors({name: factor.to(dtype) for name, factor in core.factors.items()}), rank
    return FullLayer(diff=projected.delta().to(dtype)), rank


def is_factored(rank: int, shape: tuple[int, ...]) -> bool:
    """Return whether two factors of a rank have no more numbers than a dense core.

    Args:
        rank: Rank of the core.
        shape: Shape of the dense core.
    """
    return rank * sum(shape) <= math.prod(shape)


def _expand_core(core: Core, module: SharedModule, rank: int) -> LoRALayer:
    """Restore the layer of a core in the dtype of the bases; both factors have the same norm."""
    pair = core if isinstance(core, LoRALayer) else truncate_spectrum(dense_spectrum(core.diff), rank)
    up, down = module.left.float() @ pair.up.float(), pair.down.float() @ module.right.float()
    ones = [1] * len(module.shape[2:])
    return LoRALayer(
        up=up.to(module.left.dtype).reshape(*up.shape, *ones),
        down=down.to(module.left.dtype).reshape(rank, *module.shape[1:]),
        alpha=float(rank),
    )


def _delta_distance(layer: LoRALayer, other: LoRALayer) -> float:
    """Return the Frobenius norm of the difference of two deltas."""
    return delta_norm(join_layers([(1.0, layer), (-1.0, other)])) or 0.0
