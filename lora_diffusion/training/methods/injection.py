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
from lora_diffusion.training.methods.adalora import AdaLoRACallbacks, TrainableAdaLoRA
from lora_diffusion.training.methods.base import NAME, AdapterSize, AdapterState, TrainableLayer, attach
from lora_diffusion.training.methods.callbacks import MethodCallbacks
from lora_diffusion.training.methods.dylora import DyLoRACallbacks, TrainableDyLoRA
from lora_diffusion.training.methods.loha_lokr_dora import (
    TrainableDoRA,
    TrainableFullLayer,
    TrainableLoHa,
    TrainableLoKr,
)
from lora_diffusion.training.methods.lora import TrainableLoRA
from lora_diffusion.training.methods.pissa import TrainablePiSSA
from lora_diffusion.training.methods.resume_from_adapter import layer_from_adapter
from lora_diffusion.training.methods.sparse import SparseCallbacks, TrainableSparseLoRA
from lora_diffusion.training.methods.t_lora import TrainableTLoRA, follow_timesteps
from lora_diffusion.training.methods.vera import TrainableVeRA, VeRAFactors, make_vera_factors

KINDS: Mapping[str, Any] = {
    "lora": TrainableLoRA,
    "loha": TrainableLoHa,
    "lokr": TrainableLoKr,
    "adalora": TrainableAdaLoRA,
    "dylora": TrainableDyLoRA,
    "sparse": TrainableSparseLoRA,
    "t-lora": TrainableTLoRA,
}
"""Updates that need nothing but their module; VeRA's share their factors."""


@dataclass(frozen=True, kw_only=True)
class InjectedAdapter:
    """What was put on a base."""

    parameters: dict[str, nn.Parameter]
    """Those that learn, by path and factor."""
    rules: MethodCallbacks


def inject(
    base: Base, paths: Sequence[str], config: AdapterConfig, seed: int, *, full: Sequence[str] = (), steps: int = 1
) -> InjectedAdapter:
    """Put trainable updates on the modules at `paths`, and differences on those at `full`; all else is frozen.

    A fresh update changes nothing. Its random numbers depend on seed and path alone, so that a module starts alike
    whatever else is trained. `steps` are those of the run, for kinds with a schedule. Mutates the base's models.
    Raises KeyError for a path that the base does not have, ConfigError for a pattern that matches nothing and for a
    module that the kind cannot be put on.
    """
    modules = {path: module_at(base, path) for path in paths}
    sizes = resolve_sizes(paths, config)
    shared = (
        make_vera_factors([*modules.values()], config.rank, make_generator(seed, "vera"))
        if config.kind == "vera"
        else None
    )
    updates = {path: new_layer(modules[path], sizes[path], make_generator(seed, path), shared) for path in paths}
    updates |= {path: TrainableFullLayer(module_at(base, path)) for path in full}
    parameters = attach_layers(base, updates)
    timed = [update for update in updates.values() if isinstance(update, TrainableTLoRA)]
    if timed:
        follow_timesteps(base.pipe.unet, timed, base.pipe.scheduler.config.num_train_timesteps)
    return InjectedAdapter(parameters=parameters, rules=make_callbacks(updates, config, seed, steps))


def inject_adapter(base: Base, adapter: Adapter, config: AdapterConfig) -> InjectedAdapter:
    """Put trainable updates on a base that begin as an adapter's layers; all else is frozen.

    Raises ConfigError for a layer that cannot be trained on, KeyError for a path that the base does not have.
    """
    updates = {
        path: layer_from_adapter(path, module_at(base, path), layer, adapter.biases.get(path), config)
        for path, layer in adapter.layers.items()
    }
    return InjectedAdapter(parameters=attach_layers(base, updates), rules=MethodCallbacks())


def attach_layers(base: Base, updates: Mapping[str, TrainableLayer]) -> dict[str, nn.Parameter]:
    """Freeze the base, and put an update on each module; returns what learns, by path and factor."""
    for component in base.family.components:
        getattr(base.pipe, component).requires_grad_(False)
    state = AdapterState()
    for path, update in updates.items():
        update.state = state
        attach(module_at(base, path), update)
    named = {f"{path}.{name}": p for path, update in updates.items() for name, p in update.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def new_layer(module: Any, size: AdapterSize, generator: torch.Generator, shared: VeRAFactors | None) -> TrainableLayer:
    """Raises ConfigError for a module that the kind cannot be put on."""
    config = size.config
    if shared is not None:
        return TrainableVeRA(module, size, shared)
    kind = TrainablePiSSA if config.start == "pissa" else KINDS[config.kind]
    update = kind(module, size, generator)
    return TrainableDoRA(module, update) if config.dora else update


def make_callbacks(
    updates: Mapping[str, TrainableLayer], config: AdapterConfig, seed: int, steps: int
) -> MethodCallbacks:
    """What the kind does from step to step."""
    adaptive = [update for update in updates.values() if isinstance(update, TrainableAdaLoRA)]
    nested = [update for update in updates.values() if isinstance(update, TrainableDyLoRA)]
    gated: dict[str, list[TrainableSparseLoRA]] = {}
    for path, update in updates.items():
        if isinstance(update, TrainableSparseLoRA):
            gated.setdefault(path.partition(".")[0], []).append(update)
    if adaptive:
        return AdaLoRACallbacks(adaptive, steps)
    if nested:
        return DyLoRACallbacks(nested, seed)
    return SparseCallbacks([*gated.values()], config, steps) if gated else MethodCallbacks()


def resolve_sizes(paths: Sequence[str], config: AdapterConfig) -> dict[str, AdapterSize]:
    """Rank and scale of each module. Raises ConfigError for a pattern that matches none."""
    ranks = resolve_patterns(paths, config.ranks, "adapter.ranks", config.rank)
    alphas = resolve_patterns(paths, config.alphas, "adapter.alphas", config.alpha)
    return {
        path: AdapterSize(rank=ranks[path], scale=compute_scale(ranks[path], alphas[path], config), config=config)
        for path in paths
    }


def compute_scale(rank: int, alpha: float | None, config: AdapterConfig) -> float:
    """Alpha over the rank, or over its root; 1 if there is no alpha."""
    if alpha is None:
        return 1.0
    return alpha / (rank**0.5 if config.scaling == "sqrt-rank" else rank)


def make_generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def get_layer(base: Base, path: str) -> Any:
    return getattr(module_at(base, path), NAME)


def list_layers(base: Base) -> list[TrainableLayer]:
    """Every update on a base's models."""
    models = [getattr(base.pipe, component) for component in base.family.components]
    return [module for model in models for module in model.modules() if isinstance(module, TrainableLayer)]


@contextmanager
def adapter_disabled(base: Base) -> Iterator[None]:
    """The frozen base alone while the block runs, bit for bit."""
    state = adapter_state_of(base)
    with state.overridden(replace(state.now, active=False)):
        yield


def adapter_state_of(base: Base) -> AdapterState:
    """Where the updates of a base look up what holds for all of them."""
    found = list_layers(base)
    return found[0].state if found else AdapterState()


def list_factors(base: Base, paths: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Down, up and scale of each update that has plain factors."""
    for path in paths:
        update = get_layer(base, path)
        if isinstance(update, TrainableLoRA):
            yield update.down, update.up, update.scale


@torch.no_grad()
def extract_adapter(base: Base, paths: Sequence[str], metadata: AdapterMetadata, dtype: torch.dtype) -> Adapter:
    """The updates at `paths` as a value, copied to the CPU in `dtype`."""
    updates = {path: get_layer(base, path) for path in paths}

    def is_kept(values: Tensor, name: str = "") -> Tensor:
        exact = name == "magnitude"  # rounded, it would move the base's own weight and not the delta alone
        return values.detach().to("cpu", torch.float32 if exact else dtype, copy=True).contiguous()

    def detach(layer: Layer) -> Layer:
        return layer.with_factors({name: is_kept(factor, name) for name, factor in layer.factors.items()})

    biases = {path: update.bias() for path, update in updates.items()}
    return Adapter(
        layers={path: detach(update.layer()) for path, update in updates.items()},
        biases={path: is_kept(bias) for path, bias in biases.items() if bias is not None},
        metadata=metadata,
    )
