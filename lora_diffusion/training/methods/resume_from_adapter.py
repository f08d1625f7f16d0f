"""Make trainable layers that start from the layers of an existing adapter (`adapter.init_from`)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import (
    DoRALayer,
    FullLayer,
    Layer,
    LoHaLayer,
    LoKrLayer,
    LoRALayer,
    LowRank,
)
from lora_diffusion.adapters.low_rank_products import kronecker_factor
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.training.methods.base import AdapterSize, AdditiveLayer, TrainableLayer, make_parameter
from lora_diffusion.training.methods.loha_lokr_dora import (
    TrainableDoRA,
    TrainableFullLayer,
    TrainableLoHa,
    TrainableLoKr,
)
from lora_diffusion.training.methods.lora import TrainableLoRA


def check_continuable(adapter: Adapter, path: str) -> None:
    """Check that training can continue from an adapter.

    Args:
        adapter: The adapter to start from.
        path: Its file, for the error message.

    Raises:
        ConfigError: The adapter has learned tokens, is a T-LoRA, or has no layers.
    """
    if adapter.tokens:
        raise ConfigError(
            f"adapter.init_from: {path} has learned tokens ({', '.join(adapter.tokens)}), which training would lose; "
            "remove them first (`lora-diffusion convert --without-tokens`), or train a new adapter"
        )
    if adapter.metadata.min_rank:
        raise ConfigError(
            f"adapter.init_from: {path} is a T-LoRA, whose rank depends on the timestep; training cannot continue "
            "from it; truncate it to plain LoRA first (`lora-diffusion resize --first`), or train a new adapter"
        )
    if not adapter.layers:
        raise ConfigError(f"adapter.init_from: {path} has no layers; expected an adapter with at least one layer")


def layer_from_adapter(
    path: str, module: Any, layer: Layer, bias: Tensor | None, config: AdapterConfig
) -> TrainableLayer:
    """Make a trainable layer with the values of a saved one.

    Args:
        path: Path of the module, for error messages.
        module: The frozen module.
        layer: The saved layer.
        bias: The saved delta of the module's bias, if there is one.
        config: Gives the dropout settings; everything else comes from the saved layer.

    Raises:
        ConfigError: Training does not support the kind of the layer, or a setting does not apply to it.
    """
    if not isinstance(layer, LoRALayer):
        _check_no_dropout(path, layer, config)
    if isinstance(layer, FullLayer):
        return _from_full(module, layer, bias)
    if bias is not None or not isinstance(module, nn.Linear | nn.Conv2d):
        raise ConfigError(
            f"{path}: training cannot continue from a {layer.kind} layer that has a bias or is on a norm; expected a "
            "full difference there"
        )
    if isinstance(layer, DoRALayer):
        return _from_dora(path, module, layer, config)
    if isinstance(layer, LoRALayer | LoHaLayer | LoKrLayer):
        return _from_factors(path, module, layer, config)
    raise ConfigError(
        f"{path}: training cannot continue from a {layer.kind} layer; convert it to LoRA first, with "
        "`lora-diffusion extract` or `lora-diffusion combine`"
    )


def _check_no_dropout(path: str, layer: Layer, config: AdapterConfig) -> None:
    """Raise ConfigError if a setting is on that applies to plain LoRA only."""
    for name in ("dropout", "rank_dropout", "module_dropout", "max_delta_norm"):
        if getattr(config, name):
            raise ConfigError(
                f"adapter.{name} applies to plain LoRA only, but {path} in adapter.init_from is {layer.kind}; remove "
                f"adapter.{name}"
            )


def _from_factors(path: str, module: nn.Linear | nn.Conv2d, layer: LowRank, config: AdapterConfig) -> AdditiveLayer:
    """Make a trainable LoRA, LoHa or LoKr layer. Raises ConfigError for a Tucker core."""
    if getattr(layer, "mid", None) is not None or any(name in layer.factors for name in ("t1", "t2")):
        raise ConfigError(
            f"{path}: training cannot continue from a {layer.kind} layer with a Tucker core; convert it to LoRA first, "
            "with `lora-diffusion resize`"
        )
    size = AdapterSize(rank=layer.rank, scale=layer.scale, config=_dropout_config(config))
    generator = torch.Generator()  # its values are overwritten below
    if isinstance(layer, LoRALayer):
        trainable: Any = TrainableLoRA(module, size, generator)
        trainable.down = make_parameter(layer.down.reshape(trainable.down.shape), module)
        trainable.up = make_parameter(layer.up.reshape(trainable.up.shape), module)
        return trainable
    if isinstance(layer, LoHaLayer):
        trainable = TrainableLoHa(module, size, generator)
    else:
        trainable = TrainableLoKr(module, size, generator)
        trainable.w2 = trainable.w2_a = trainable.w2_b = None
        layer = replace(layer, w1=kronecker_factor(layer.w1, layer.w1_a, layer.w1_b, None), w1_a=None, w1_b=None)
    for name, values in layer.factors.items():
        setattr(trainable, name, make_parameter(values, module))
    return trainable


def _dropout_config(config: AdapterConfig) -> AdapterConfig:
    """Return a config with the dropout settings only; method, ranks and scales come from the file."""
    settings = {"dropout": config.dropout, "rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
    return AdapterConfig.model_validate(settings)


def _from_dora(path: str, module: nn.Linear | nn.Conv2d, layer: DoRALayer, config: AdapterConfig) -> TrainableLayer:
    """Make a trainable DoRA layer. Raises ConfigError for magnitudes by input."""
    if not layer.per_output:
        raise ConfigError(
            f"{path}: training cannot continue from a DoRA layer with one magnitude per input; expected one per output"
        )
    trainable = TrainableDoRA(module, _from_factors(path, module, layer.inner, config))
    trainable.magnitude = make_parameter(layer.magnitude.reshape(trainable.magnitude.shape), module)
    return trainable


def _from_full(module: Any, layer: FullLayer, bias: Tensor | None) -> TrainableLayer:
    """Make a trainable full difference."""
    trainable = TrainableFullLayer(module)
    trainable.diff = make_parameter(layer.diff.reshape(module.weight.shape), module)
    if bias is not None:
        trainable.bias_diff = make_parameter(bias, module)
    return trainable
