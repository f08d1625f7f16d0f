"""Inject trainable adapter layers into a base, disable them, and extract them as an adapter."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.architectures.targets import resolve_patterns
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.core.seeding import make_generator
from lora_diffusion.models.load import Base, module_at
from lora_diffusion.training.methods.adalora import AdaLoRACallbacks, TrainableAdaLoRA
from lora_diffusion.training.methods.base import SUBMODULE_NAME, AdapterSize, AdapterState, TrainableLayer, attach
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

_LAYER_CLASSES: Mapping[str, Any] = {
    "lora": TrainableLoRA,
    "loha": TrainableLoHa,
    "lokr": TrainableLoKr,
    "adalora": TrainableAdaLoRA,
    "dylora": TrainableDyLoRA,
    "sparse": TrainableSparseLoRA,
    "t-lora": TrainableTLoRA,
}
"""Trainable layer by `adapter.kind`, except for VeRA, whose layers share their factors."""


@dataclass(frozen=True, kw_only=True)
class InjectedAdapter:
    """The trainable layers that have been injected into a base."""

    parameters: dict[str, nn.Parameter] = field(repr=False)
    """Trained parameters by module path and factor, such as `unet.conv_in.down`."""
    callbacks: MethodCallbacks
    """Callbacks of the training method."""


def inject(
    base: Base, paths: Sequence[str], config: AdapterConfig, seed: int, *, full: Sequence[str] = (), steps: int = 1
) -> InjectedAdapter:
    """Inject new trainable layers into a base and freeze everything else. Mutates the models of the base.

    New layers do not change the output of the base. The initial values of a layer depend on the seed and its path
    alone, not on which other modules are trained.

    Args:
        base: The base to train on.
        paths: Paths of the modules that get a layer of the configured kind.
        config: Method, ranks and scales.
        seed: Seed of the initial values.
        full: Paths of the modules that are trained in full, as differences of weight and bias.
        steps: Number of steps of the run, for methods with a schedule.

    Raises:
        KeyError: The base has no module at a path.
        ConfigError: A pattern in `config` matches no module, or the method does not support a module.
    """
    modules = {path: module_at(base, path) for path in paths}
    sizes = _resolve_sizes(paths, config)
    shared = (
        make_vera_factors([*modules.values()], config.rank, make_generator(seed, "vera"))
        if config.kind == "vera"
        else None
    )
    layers: dict[str, TrainableLayer] = {
        path: _new_layer(modules[path], sizes[path], make_generator(seed, path), shared) for path in paths
    }
    layers |= {path: TrainableFullLayer(module_at(base, path)) for path in full}
    parameters = _attach_layers(base, layers)
    t_lora_layers = [layer for layer in layers.values() if isinstance(layer, TrainableTLoRA)]
    if t_lora_layers:
        follow_timesteps(base.pipe.unet, t_lora_layers, base.pipe.scheduler.config.num_train_timesteps)
    return InjectedAdapter(parameters=parameters, callbacks=_make_callbacks(layers, config, seed, steps))


def inject_adapter(base: Base, adapter: Adapter, config: AdapterConfig) -> InjectedAdapter:
    """Inject trainable layers that start as the layers of an adapter, and freeze everything else.

    Args:
        base: The base to train on; its models are mutated.
        adapter: Gives the modules, methods, ranks, scales and initial values.
        config: Gives the dropout settings.

    Raises:
        ConfigError: Training does not support a layer of the adapter.
        KeyError: The base has no module at one of the adapter's paths.
    """
    layers = {
        path: layer_from_adapter(path, module_at(base, path), layer, adapter.biases.get(path), config)
        for path, layer in adapter.layers.items()
    }
    return InjectedAdapter(parameters=_attach_layers(base, layers), callbacks=MethodCallbacks())


def _attach_layers(base: Base, layers: Mapping[str, TrainableLayer]) -> dict[str, nn.Parameter]:
    """Freeze the base, attach the layers, and return the trained parameters by module path and factor."""
    for component in base.family.components:
        getattr(base.pipe, component).requires_grad_(False)
    state = AdapterState()
    for path, layer in layers.items():
        layer.state = state
        attach(module_at(base, path), layer)
    named = {f"{path}.{name}": p for path, layer in layers.items() for name, p in layer.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def _new_layer(
    module: Any, size: AdapterSize, generator: torch.Generator, shared: VeRAFactors | None
) -> TrainableLayer:
    """Make a trainable layer of the configured kind. Raises ConfigError if it does not support the module."""
    config = size.config
    if shared is not None:
        return TrainableVeRA(module, size, shared)
    layer_class = TrainablePiSSA if config.init_weights == "pissa" else _LAYER_CLASSES[config.kind]
    layer = layer_class(module, size, generator)
    return TrainableDoRA(module, layer) if config.use_dora else layer


def _make_callbacks(
    layers: Mapping[str, TrainableLayer], config: AdapterConfig, seed: int, steps: int
) -> MethodCallbacks:
    """Make the callbacks of the configured method."""
    adalora = [layer for layer in layers.values() if isinstance(layer, TrainableAdaLoRA)]
    dylora = [layer for layer in layers.values() if isinstance(layer, TrainableDyLoRA)]
    sparse_by_component: dict[str, list[TrainableSparseLoRA]] = {}
    for path, layer in layers.items():
        if isinstance(layer, TrainableSparseLoRA):
            sparse_by_component.setdefault(path.partition(".")[0], []).append(layer)
    if adalora:
        return AdaLoRACallbacks(adalora, steps)
    if dylora:
        return DyLoRACallbacks(dylora, seed)
    if sparse_by_component:
        return SparseCallbacks([*sparse_by_component.values()], config, steps)
    return MethodCallbacks()


def _resolve_sizes(paths: Sequence[str], config: AdapterConfig) -> dict[str, AdapterSize]:
    """Compute rank and scale of each module. Raises ConfigError if a pattern matches no module."""
    ranks = resolve_patterns(paths, config.rank_pattern, "adapter.rank_pattern", config.rank)
    alphas = resolve_patterns(paths, config.alpha_pattern, "adapter.alpha_pattern", config.alpha)
    return {
        path: AdapterSize(rank=ranks[path], scale=_compute_scale(ranks[path], alphas[path], config), config=config)
        for path in paths
    }


def _compute_scale(rank: int, alpha: float | None, config: AdapterConfig) -> float:
    """Compute alpha / rank, or alpha / sqrt(rank) for rsLoRA; 1 without an alpha."""
    if alpha is None:
        return 1.0
    return alpha / (rank**0.5 if config.use_rslora else rank)


def get_layer(base: Base, path: str) -> Any:
    """Return the trainable layer of the module at a path."""
    return getattr(module_at(base, path), SUBMODULE_NAME)


def _list_layers(base: Base) -> list[TrainableLayer]:
    """List all trainable layers of a base."""
    models = [getattr(base.pipe, component) for component in base.family.components]
    return [module for model in models for module in model.modules() if isinstance(module, TrainableLayer)]


@contextmanager
def adapter_disabled(base: Base) -> Generator[None]:
    """Disable all trainable layers inside the context, so that the base predicts exactly as without them."""
    state = adapter_state_of(base)
    with state.override(replace(state.current, active=False)):
        yield


def adapter_state_of(base: Base) -> AdapterState:
    """Return the state that all trainable layers of a base share, or a new one if there are none."""
    layers = _list_layers(base)
    return layers[0].state if layers else AdapterState()


def list_factors(base: Base, paths: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield `down`, `up` and the scale of the layers at `paths` that are LoRA; other methods are skipped."""
    for path in paths:
        layer = get_layer(base, path)
        if isinstance(layer, TrainableLoRA):
            yield layer.down, layer.up, layer.scale


@torch.no_grad()
def extract_adapter(base: Base, paths: Sequence[str], metadata: AdapterMetadata, dtype: torch.dtype) -> Adapter:
    """Extract the trained layers at `paths` as an adapter, copied to the CPU.

    Tensors are converted to `dtype`, except for DoRA's magnitudes, which stay float32.
    """
    layers: dict[str, TrainableLayer] = {path: get_layer(base, path) for path in paths}

    def copy_tensor(values: Tensor, name: str = "") -> Tensor:
        # A rounded magnitude would change the base weight itself, not only the delta.
        target = torch.float32 if name == "magnitude" else dtype
        return values.detach().to("cpu", target, copy=True).contiguous()

    def copy_layer(layer: Layer) -> Layer:
        return layer.with_factors({name: copy_tensor(factor, name) for name, factor in layer.factors.items()})

    biases = {path: layer.bias() for path, layer in layers.items()}
    return Adapter(
        layers={path: copy_layer(layer.layer()) for path, layer in layers.items()},
        biases={path: copy_tensor(bias) for path, bias in biases.items() if bias is not None},
        metadata=metadata,
    )
