"""Checks during and after training that stop a run whose result would be useless."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter, adapter_hash
from lora_diffusion.errors import TrainingError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.models.load import Base, module_at

_LINALG: Any = torch.linalg  # PyTorch does not annotate its functions


def check_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TrainingError if no parameter requires a gradient."""
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise TrainingError(
            "there are no trainable parameters; check adapter.unet_target_modules, adapter.text_encoder_target_modules "
            "and the learning rates"
        )


def check_finite(loss: Tensor, step: int) -> None:
    """Raise TrainingError if the loss is NaN or infinite. Call this before the optimizer step.

    Args:
        loss: Scalar loss.
        step: Number of the optimizer step, counted from 1, for the message.
    """
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"the loss at step {step} is {float(loss.detach())}; training stopped before this step. Lower "
            "learning_rate, or use mixed_precision 'bf16' or 'no'"
        )


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TrainingError if all gradients of a component are zero or missing after the first backward pass.

    The check is per component and not per parameter, because `up` is initialized with zeros and therefore `down` has a
    zero gradient in the first step.

    Args:
        parameters: Trainable parameters; names start with their component, such as `unet.`.
    """
    has_gradient: dict[str, bool] = {}
    for name, parameter in parameters.items():
        component = name.partition(".")[0]
        nonzero = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        has_gradient[component] = has_gradient.get(component, False) or nonzero
    without_gradient = [component for component, nonzero in has_gradient.items() if not nonzero]
    if without_gradient:
        raise TrainingError(
            f"the gradients of {' and '.join(without_gradient)} are zero, so nothing would be learned there; please "
            "report this as a bug with the settings of the run, or exclude this component from the training"
        )


@contextmanager
def explained_memory_errors() -> Generator[None]:
    """Convert out-of-memory errors into a TrainingError that names the settings which save the most memory."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise TrainingError(
            "there is not enough memory for a training step; set compute.gradient_checkpointing to true, batch_size "
            "to 1 with more gradient_accumulation, or a lower data.resolution "
            f"({str(error).splitlines()[0][:120]})"
        ) from None


def check_saved(adapter: Adapter, path: Path, base: Base) -> None:
    """Read a saved adapter back and check that it contains what was trained.

    Args:
        adapter: The adapter that was saved.
        path: The file it was saved to.
        base: The base it was trained on; DoRA needs its weights to compute deltas.

    Raises:
        TrainingError: If the content of the file differs from `adapter`, or if all deltas of a component are zero.
    """
    if adapter_hash(load_adapter(path)) != adapter_hash(adapter):
        raise TrainingError(
            f"{path}: the file does not contain the adapter that was written to it; the disk may be faulty, save to "
            "another one"
        )
    norms: dict[str, float] = {}
    for module, layer in adapter.layers.items():
        component = module.partition(".")[0]
        frozen: Any = module_at(base, module)
        weight = frozen.weight.detach().cpu() if layer.kind == "DoRA" else None
        norms[component] = norms.get(component, 0.0) + float(_LINALG.vector_norm(layer.delta(weight)))
    unchanged = [component for component, norm in norms.items() if norm == 0]
    if unchanged:
        raise TrainingError(
            f"{path}: the file was written, but its deltas for {' and '.join(unchanged)} are all zero; raise the "
            "learning rate or the number of steps"
        )
