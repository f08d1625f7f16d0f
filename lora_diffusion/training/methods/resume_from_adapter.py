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
    kronecker_factor,
)
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.training.methods.base import AddedUpdate, Size, Update, learned
from lora_diffusion.training.methods.loha_lokr_dora import (
    DecomposedUpdate,
    FullUpdate,
    HadamardUpdate,
    KroneckerUpdate,
)
from lora_diffusion.training.methods.lora import LowRankUpdate


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


def update_of(path: str, module: Any, layer: Layer, bias: Tensor | None, config: AdapterConfig) -> Update:
    """A trainable update with a layer's values. Raises ConfigError for a kind that cannot be trained on."""
    if not isinstance(layer, LoRALayer):
        refuse_thinning(path, layer, config)
    if isinstance(layer, FullLayer):
        return whole(module, layer, bias)
    if bias is not None or not isinstance(module, nn.Linear | nn.Conv2d):
        raise ConfigError(f"{path}: has a bias or sits on a norm, which goes on only as a full difference")
    if isinstance(layer, DoRALayer):
        return decomposed(path, module, layer, config)
    if isinstance(layer, LoRALayer | LoHaLayer | LoKrLayer):
        return factored(path, module, layer, config)
    raise ConfigError(f"{path}: is {layer.kind}, which cannot be trained on; extract or combine it to LoRA first")


def refuse_thinning(path: str, layer: Layer, config: AdapterConfig) -> None:
    """Raise ConfigError for settings of plain factors, which the layer has not."""
    for name in ("dropout", "rank_dropout", "module_dropout", "max_norm"):
        if getattr(config, name):
            raise ConfigError(
                f"adapter.{name} is of plain factors, and {path} in adapter.begin_with is {layer.kind}; leave it out"
            )


def factored(path: str, module: nn.Linear | nn.Conv2d, layer: LowRank, config: AdapterConfig) -> AddedUpdate:
    """Of factors; those with Tucker cores have no update here."""
    if getattr(layer, "mid", None) is not None or any(name in layer.factors for name in ("t1", "t2")):
        raise ConfigError(f"{path}: is {layer.kind} with a Tucker core, which cannot be trained on; resize it to LoRA")
    size, rng = Size(rank=layer.rank, scale=layer.scale, config=plain(config)), torch.Generator()
    if isinstance(layer, LoRALayer):
        update: Any = LowRankUpdate(module, size, rng)
        update.down = learned(layer.down.reshape(update.down.shape), module)
        update.up = learned(layer.up.reshape(update.up.shape), module)
        return update
    if isinstance(layer, LoHaLayer):
        update = HadamardUpdate(module, size, rng)
    else:
        update = KroneckerUpdate(module, size, rng)
        update.w2 = update.w2_a = update.w2_b = None
        layer = replace(layer, w1=kronecker_factor(layer.w1, layer.w1_a, layer.w1_b, None), w1_a=None, w1_b=None)
    for name, values in layer.factors.items():
        setattr(update, name, learned(values, module))
    return update


def plain(config: AdapterConfig) -> AdapterConfig:
    """What of a config still holds where kind, ranks and scales are the file's own: dropout."""
    kept = {"dropout": config.dropout, "rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
    return AdapterConfig.model_validate(kept)


def decomposed(path: str, module: nn.Linear | nn.Conv2d, layer: DoRALayer, config: AdapterConfig) -> Update:
    if not layer.per_output:
        raise ConfigError(
            f"{path}: is DoRA with magnitudes by input, of which training goes on with those by output only"
        )
    update = DecomposedUpdate(module, factored(path, module, layer.inner, config))
    update.magnitude = learned(layer.magnitude.reshape(update.magnitude.shape), module)
    return update


def whole(module: Any, layer: FullLayer, bias: Tensor | None) -> Update:
    update = FullUpdate(module)
    update.diff = learned(layer.diff.reshape(module.weight.shape), module)
    if bias is not None:
        update.bias_diff = learned(bias, module)
    return update
