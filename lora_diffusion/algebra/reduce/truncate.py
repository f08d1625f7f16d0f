"""An adapter cut to the first directions of each module, as they stand: what DyLoRA trains for [arXiv:2210.07558]."""

from dataclasses import replace

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.adapters.t_lora import truncate_layer
from lora_diffusion.algebra.reduce.resize import CompressionReport, ModuleLoss
from lora_diffusion.errors import ConfigError


def truncate_adapter(adapter: Adapter, count: int) -> tuple[Adapter, CompressionReport]:
    """The adapter with at most `count` directions in each module, and what that took; no SVD, scales stay.

    Raises ConfigError for a count below 1 and for a layer that is no plain LoRA.
    """
    if count < 1:
        raise ConfigError(f"first is {count}; expected a whole number of at least 1")
    cut = {path: truncate_module(path, layer, count) for path, layer in adapter.layers.items()}
    metadata = adapter.metadata.model_copy(update={"least_rank": 0})
    losses = {
        path: measure_module_loss(adapter.layers[path], layer)
        for path, layer in cut.items()
        if isinstance(layer, LoRALayer)
    }
    return replace(adapter, layers=cut, metadata=metadata), CompressionReport(modules=losses)


def truncate_module(path: str, layer: Layer, count: int) -> Layer:
    if layer.kind == "full":
        return layer
    if not isinstance(layer, LoRALayer) or layer.mid is not None:
        raise ConfigError(f"{path}: is {layer.kind} with no first directions of its own; use --rank or --keep instead")
    return truncate_layer(layer, count)


def measure_module_loss(whole: Layer, cut: LoRALayer) -> ModuleLoss:
    assert isinstance(whole, LoRALayer)
    before = whole.delta()
    lost = before - cut.delta()
    return ModuleLoss(
        rank_before=whole.rank,
        rank_after=cut.rank,
        norm=float(before.square().sum().sqrt()),
        lost=float(lost.square().sum().sqrt()),
    )
