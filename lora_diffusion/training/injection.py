"""PEFT's trainable layers into a base, and an Adapter out of them."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.config import TrainConfig
from lora_diffusion.layers import LoRALayer
from lora_diffusion.models import Base, live_path, module_at

NAME = "default"


def inject(base: Base, paths: Sequence[str], config: TrainConfig) -> dict[str, list[nn.Parameter]]:
    """Put trainable LoRA layers at `paths`; returns the new parameters by component, all float32.

    A fresh layer changes nothing: `up` starts at zero. Mutates the base's models. Raises KeyError for a path that
    the base does not have, which PEFT would pass over in silence.
    """
    for path in paths:
        module_at(base, path)
    parameters: dict[str, list[nn.Parameter]] = {}
    for component in base.family.components:
        inner = [path.split(".", 1)[1] for path in paths if path.startswith(f"{component}.")]
        if not inner:
            continue
        model: nn.Module = getattr(base.pipe, component)
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # declared int, used as a number
            lora_dropout=config.dropout,
            target_modules=[live_path(model, path) for path in inner],
        )
        inject_adapter_in_model(settings, model, adapter_name=NAME)
        new = [p for p in model.parameters() if p.requires_grad]
        for p in new:
            p.data = p.data.float()
        parameters[component] = new
    return parameters


def extract(base: Base, paths: Sequence[str], metadata: AdapterMetadata, dtype: torch.dtype) -> Adapter:
    """The injected layers as a value, copied to the CPU in `dtype`."""
    return Adapter(layers={path: extract_layer(module_at(base, path), dtype) for path in paths}, metadata=metadata)


def extract_layer(module: Any, dtype: torch.dtype) -> LoRALayer:
    down, up = (factors[NAME].weight.detach() for factors in (module.lora_A, module.lora_B))
    alpha = float(module.scaling[NAME] * module.r[NAME])
    return LoRALayer(down=down.to("cpu", dtype, copy=True), up=up.to("cpu", dtype, copy=True), alpha=alpha)
