"""Updates that begin as the layers of an adapter, whatever its kind and wherever it came from."""

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
    """Raise ConfigError for what would be lost, or cannot be trained on."""
    if adapter.tokens:
        raise ConfigError(
            f"adapter.begin_with: {path} has learned words ({', '.join(adapter.tokens)}), which training goes on "
            "without; leave them out (`lora-diffusion convert --without-tokens`), or train anew"
        )
    if adapter.metadata.least_rank:
        raise ConfigError(
            f"adapter.begin_with: {path} is T-LoRA, whose ranks go with the timestep, which training would not go on "
            "with; cut it to plain LoRA first (`lora-diffusion resize --first`), or train anew"
        )
    if not adapter.layers:
        raise ConfigError(f"adapter.begin_with: {path} has no layers to go on with")


def layer_from_adapter(
    path: str, module: Any, layer: Layer, bias: Tensor | None, config: AdapterConfig
) -> TrainableLayer:
    """A trainable update with a layer's values. Raises ConfigError for a kind that cannot be trained on."""
    if not isinstance(layer, LoRALayer):
        check_no_dropout(path, layer, config)
    if isinstance(layer, FullLayer):
        return from_full(module, layer, bias)
    if bias is not None or not isinstance(module, nn.Linear | nn.Conv2d):
        raise ConfigError(f"{path}: has a bias or sits on a norm, which goes on only as a full difference")
    if isinstance(layer, DoRALayer):
        return from_dora(path, module, layer, config)
    if isinstance(layer, LoRALayer | LoHaLayer | LoKrLayer):
        return from_factors(path, module, layer, config)
    raise ConfigError(f"{path}: is {layer.kind}, which cannot be trained on; extract or combine it to LoRA first")


def check_no_dropout(path: str, layer: Layer, config: AdapterConfig) -> None:
    """Raise ConfigError for settings of plain factors, which the layer has not."""
    for name in ("dropout", "rank_dropout", "module_dropout", "max_norm"):
        if getattr(config, name):
            raise ConfigError(
                f"adapter.{name} is of plain factors, and {path} in adapter.begin_with is {layer.kind}; leave it out"
            )


def from_factors(path: str, module: nn.Linear | nn.Conv2d, layer: LowRank, config: AdapterConfig) -> AdditiveLayer:
    """Of factors; those with Tucker cores have no update here."""
    if getattr(layer, "mid", None) is not None or any(name in layer.factors for name in ("t1", "t2")):
        raise ConfigError(f"{path}: is {layer.kind} with a Tucker core, which cannot be trained on; resize it to LoRA")
    size, rng = AdapterSize(rank=layer.rank, scale=layer.scale, config=dropout_config(config)), torch.Generator()
    if isinstance(layer, LoRALayer):
        update: Any = TrainableLoRA(module, size, rng)
        update.down = make_parameter(layer.down.reshape(update.down.shape), module)
        update.up = make_parameter(layer.up.reshape(update.up.shape), module)
        return update
    if isinstance(layer, LoHaLayer):
        update = TrainableLoHa(module, size, rng)
    else:
        update = TrainableLoKr(module, size, rng)
        update.w2 = update.w2_a = update.w2_b = None
        layer = replace(layer, w1=kronecker_factor(layer.w1, layer.w1_a, layer.w1_b, None), w1_a=None, w1_b=None)
    for name, values in layer.factors.items():
        setattr(update, name, make_parameter(values, module))
    return update


def dropout_config(config: AdapterConfig) -> AdapterConfig:
    """What of a config still holds where kind, ranks and scales are the file's own: dropout."""
    kept = {"dropout": config.dropout, "rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
    return AdapterConfig.model_validate(kept)


def from_dora(path: str, module: nn.Linear | nn.Conv2d, layer: DoRALayer, config: AdapterConfig) -> TrainableLayer:
    if not layer.per_output:
        raise ConfigError(
            f"{path}: is DoRA with magnitudes by input, of which training goes on with those by output only"
        )
    update = TrainableDoRA(module, from_factors(path, module, layer.inner, config))
    update.magnitude = make_parameter(layer.magnitude.reshape(update.magnitude.shape), module)
    return update


def from_full(module: Any, layer: FullLayer, bias: Tensor | None) -> TrainableLayer:
    update = TrainableFullLayer(module)
    update.diff = make_parameter(layer.diff.reshape(module.weight.shape), module)
    if bias is not None:
        update.bias_diff = make_parameter(bias, module)
    return update
