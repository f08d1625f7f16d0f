"""Updates put on a base's modules, switched off and on, and read as an adapter."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.architectures.targets import resolve_patterns
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.models.load import Base, module_at
from lora_diffusion.training.methods.adalora import AdaptiveRules, AdaptiveUpdate
from lora_diffusion.training.methods.base import NAME, Size, Told, Update, attach
from lora_diffusion.training.methods.callbacks import Rules
from lora_diffusion.training.methods.dylora import NestedRules, NestedUpdate
from lora_diffusion.training.methods.loha_lokr_dora import DecomposedUpdate, FullUpdate, HadamardUpdate, KroneckerUpdate
from lora_diffusion.training.methods.lora import LowRankUpdate
from lora_diffusion.training.methods.pissa import SpectralUpdate
from lora_diffusion.training.methods.resume_from_adapter import update_of
from lora_diffusion.training.methods.sparse import GatedUpdate, SparseRules
from lora_diffusion.training.methods.t_lora import TimedUpdate, follow_timesteps
from lora_diffusion.training.methods.vera import SharedFactors, SharedUpdate, shared_factors

KINDS: Mapping[str, Any] = {
    "lora": LowRankUpdate,
    "loha": HadamardUpdate,
    "lokr": KroneckerUpdate,
    "adalora": AdaptiveUpdate,
    "dylora": NestedUpdate,
    "sparse": GatedUpdate,
    "t-lora": TimedUpdate,
}
"""Updates that need nothing but their module; VeRA's share their factors."""


@dataclass(frozen=True, kw_only=True)
class Injected:
    """What was put on a base."""

    parameters: dict[str, nn.Parameter]
    """Those that learn, by path and factor."""
    rules: Rules


def inject(
    base: Base, paths: Sequence[str], config: AdapterConfig, seed: int, *, full: Sequence[str] = (), steps: int = 1
) -> Injected:
    """Put trainable updates on the modules at `paths`, and differences on those at `full`; all else is frozen.

    A fresh update changes nothing. Its random numbers depend on seed and path alone, so that a module starts alike
    whatever else is trained. `steps` are those of the run, for kinds with a schedule. Mutates the base's models.
    Raises KeyError for a path that the base does not have, ConfigError for a pattern that matches nothing and for a
    module that the kind cannot be put on.
    """
    modules = {path: module_at(base, path) for path in paths}
    sizes = sizes_of(paths, config)
    shared = (
        shared_factors([*modules.values()], config.rank, generator_of(seed, "vera")) if config.kind == "vera" else None
    )
    updates = {path: new_update(modules[path], sizes[path], generator_of(seed, path), shared) for path in paths}
    updates |= {path: FullUpdate(module_at(base, path)) for path in full}
    parameters = put(base, updates)
    timed = [update for update in updates.values() if isinstance(update, TimedUpdate)]
    if timed:
        follow_timesteps(base.pipe.unet, timed, base.pipe.scheduler.config.num_train_timesteps)
    return Injected(parameters=parameters, rules=rules_of(updates, config, seed, steps))


def inject_adapter(base: Base, adapter: Adapter, config: AdapterConfig) -> Injected:
    """Put trainable updates on a base that begin as an adapter's layers; all else is frozen.

    Raises ConfigError for a layer that cannot be trained on, KeyError for a path that the base does not have.
    """
    updates = {
        path: update_of(path, module_at(base, path), layer, adapter.biases.get(path), config)
        for path, layer in adapter.layers.items()
    }
    return Injected(parameters=put(base, updates), rules=Rules())


def put(base: Base, updates: Mapping[str, Update]) -> dict[str, nn.Parameter]:
    """Freeze the base, and put an update on each module; returns what learns, by path and factor."""
    for component in base.family.components:
        getattr(base.pipe, component).requires_grad_(False)
    told = Told()
    for path, update in updates.items():
        update.told = told
        attach(module_at(base, path), update)
    named = {f"{path}.{name}": p for path, update in updates.items() for name, p in update.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def new_update(module: Any, size: Size, generator: torch.Generator, shared: SharedFactors | None) -> Update:
    """Raises ConfigError for a module that the kind cannot be put on."""
    config = size.config
    if shared is not None:
        return SharedUpdate(module, size, shared)
    kind = SpectralUpdate if config.start == "pissa" else KINDS[config.kind]
    update = kind(module, size, generator)
    return DecomposedUpdate(module, update) if config.dora else update


def rules_of(updates: Mapping[str, Update], config: AdapterConfig, seed: int, steps: int) -> Rules:
    """What the kind does from step to step."""
    adaptive = [update for update in updates.values() if isinstance(update, AdaptiveUpdate)]
    nested = [update for update in updates.values() if isinstance(update, NestedUpdate)]
    gated: dict[str, list[GatedUpdate]] = {}
    for path, update in updates.items():
        if isinstance(update, GatedUpdate):
            gated.setdefault(path.partition(".")[0], []).append(update)
    if adaptive:
        return AdaptiveRules(adaptive, steps)
    if nested:
        return NestedRules(nested, seed)
    return SparseRules([*gated.values()], config, steps) if gated else Rules()


def sizes_of(paths: Sequence[str], config: AdapterConfig) -> dict[str, Size]:
    """Rank and scale of each module. Raises ConfigError for a pattern that matches none."""
    ranks = resolve_patterns(paths, config.ranks, "adapter.ranks", config.rank)
    alphas = resolve_patterns(paths, config.alphas, "adapter.alphas", config.alpha)
    return {
        path: Size(rank=ranks[path], scale=scale_of(ranks[path], alphas[path], config), config=config) for path in paths
    }


def scale_of(rank: int, alpha: float | None, config: AdapterConfig) -> float:
    """Alpha over the rank, or over its root; 1 if there is no alpha."""
    if alpha is None:
        return 1.0
    return alpha / (rank**0.5 if config.scaling == "sqrt-rank" else rank)


def generator_of(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def update_at(base: Base, path: str) -> Any:
    return getattr(module_at(base, path), NAME)


def updates_of(base: Base) -> list[Update]:
    """Every update on a base's models."""
    models = [getattr(base.pipe, component) for component in base.family.components]
    return [module for model in models for module in model.modules() if isinstance(module, Update)]


@contextmanager
def disabled(base: Base) -> Iterator[None]:
    """The frozen base alone while the block runs, bit for bit."""
    told = told_of(base)
    with told.under(replace(told.now, active=False)):
        yield


def told_of(base: Base) -> Told:
    """Where the updates of a base look up what holds for all of them."""
    found = updates_of(base)
    return found[0].told if found else Told()


def layer_factors(base: Base, paths: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Down, up and scale of each update that has plain factors."""
    for path in paths:
        update = update_at(base, path)
        if isinstance(update, LowRankUpdate):
            yield update.down, update.up, update.scale


@torch.no_grad()
def extract(base: Base, paths: Sequence[str], metadata: AdapterMetadata, dtype: torch.dtype) -> Adapter:
    """The updates at `paths` as a value, copied to the CPU in `dtype`."""
    updates = {path: update_at(base, path) for path in paths}

    def kept(values: Tensor, name: str = "") -> Tensor:
        exact = name == "magnitude"  # rounded, it would move the base's own weight and not the delta alone
        return values.detach().to("cpu", torch.float32 if exact else dtype, copy=True).contiguous()

    def at_rest(layer: Layer) -> Layer:
        return layer.with_factors({name: kept(factor, name) for name, factor in layer.factors.items()})

    biases = {path: update.bias() for path, update in updates.items()}
    return Adapter(
        layers={path: at_rest(update.layer()) for path, update in updates.items()},
        biases={path: kept(bias) for path, bias in biases.items() if bias is not None},
        metadata=metadata,
    )
