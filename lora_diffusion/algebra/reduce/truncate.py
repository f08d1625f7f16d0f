"""Truncate an adapter to the first rank dimensions of each module, as DyLoRA trains them [arXiv:2210.07558]."""

from dataclasses import replace

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import Layer, LoRALayer
from lora_diffusion.adapters.t_lora import truncate_layer
from lora_diffusion.algebra.reduce.resize import CompressionReport, ModuleLoss
from lora_diffusion.errors import ConfigError


def truncate_adapter(adapter: Adapter, count: int) -> tuple[Adapter, CompressionReport]:
    """Keep the first `count` rows of `down` and columns of `up` in each layer, without an SVD; scales stay the same.

    Args:
        adapter: Adapter of plain LoRA layers; full differences, such as those of norms, are kept as they are.
        count: Highest rank to keep.

    Returns:
        The truncated adapter and the loss of each LoRA module.

    Raises:
        ConfigError: If the count is below 1 or a layer is neither plain LoRA nor a full difference.
    """
    if count < 1:
        raise ConfigError(f"first is {count}; expected an integer of at least 1")
    truncated = {path: _truncate_module(path, layer, count) for path, layer in adapter.layers.items()}
    metadata = adapter.metadata.model_copy(update={"min_rank": 0})
    losses = {
        path: _measure_module_loss(adapter.layers[path], layer)
        for path, layer in truncated.items()
        if isinstance(layer, LoRALayer)
    }
    return replace(adapter, layers=truncated, metadata=metadata), CompressionReport(modules=losses)


def _truncate_module(path: str, layer: Layer, count: int) -> Layer:
    if layer.kind == "full":
        return layer
    if not isinstance(layer, LoRALayer) or layer.mid is not None:
        kind = "LoRA with a Tucker core" if isinstance(layer, LoRALayer) else layer.kind
        raise ConfigError(
            f"{path}: only plain LoRA can be truncated to its first rank dimensions, and this layer is {kind}; "
            "use --rank or --keep instead"
        )
    return truncate_layer(layer, count)


def _measure_module_loss(before: Layer, after: LoRALayer) -> ModuleLoss:
    assert isinstance(before, LoRALayer)
    delta = before.delta()
    difference = delta - after.delta()
    return ModuleLoss(
        rank_before=before.rank,
        rank_after=after.rank,
        norm=float(delta.square().sum().sqrt()),
        lost=float(difference.square().sum().sqrt()),
    )
