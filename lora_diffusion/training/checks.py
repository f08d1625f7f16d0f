"""What would make a run worthless, found while it can still be helped: each stops it with one sentence."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter, adapter_hash
from lora_diffusion.errors import TrainingError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.models.load import Base, module_at


def check_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TrainingError if there is nothing to train."""
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise TrainingError("nothing is trainable; check adapter.unet_targets, adapter.text_encoder_targets and rates")


def check_finite(loss: Tensor, step: int) -> None:
    """Raise TrainingError for a loss that is no number, before the optimizer has moved."""
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"the loss at step {step} is {float(loss)}; nothing was written for this step. Lower learning_rate, or "
            "use mixed_precision 'bf16' or 'no'"
        )


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TrainingError if no gradient reaches a component that should train; after the first backward pass.

    A fresh layer's first gradient is `up`'s alone, as `up` is zero.
    """
    reached: dict[str, bool] = {}
    for name, parameter in parameters.items():
        component = name.partition(".")[0]
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        reached[component] = reached.get(component, False) or moved
    silent = [component for component, moved in reached.items() if not moved]
    if silent:
        raise TrainingError(
            f"no gradient reaches {' and '.join(silent)}, so it would not learn; report this with the run's settings, "
            "or train without it"
        )


@contextmanager
def explained_memory_errors() -> Iterator[None]:
    """Turn running out of memory into a TrainingError that names the settings which help most."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise TrainingError(
            "there is not enough memory for a step; set compute.gradient_checkpointing to true, batch_size to 1 with "
            f"more gradient_accumulation, or a lower data.resolution ({str(error).splitlines()[0][:120]})"
        ) from None


def check_saved(adapter: Adapter, path: Path, base: Base) -> None:
    """Raise TrainingError unless the file holds what was trained, and that does something in each component."""
    if adapter_hash(load_adapter(path)) != adapter_hash(adapter):
        raise TrainingError(f"{path}: does not read back as what was trained; the disk may be faulty, save elsewhere")
    norms: dict[str, float] = {}
    for module, layer in adapter.layers.items():
        component = module.partition(".")[0]
        frozen: Any = module_at(base, module)
        weight = frozen.weight.detach().cpu() if layer.kind == "DoRA" else None  # which others have no need of
        norms[component] = norms.get(component, 0.0) + float(layer.delta(weight).norm())
    dead = [component for component, norm in norms.items() if norm == 0]
    if dead:
        raise TrainingError(
            f"{path}: is written, but its part in {' and '.join(dead)} is zero; raise the learning rate or the steps"
        )
