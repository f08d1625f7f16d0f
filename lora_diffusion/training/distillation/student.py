"""Train the student of a distillation, and measure the error of its predictions.

The student is the base with one LoRA; the teacher's predictions are recorded by `trajectories`.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.data.sampler import picture_order
from lora_diffusion.inference.composition import is_unet_path
from lora_diffusion.inference.in_place import Backup, blended_weights
from lora_diffusion.inference.low_rank_forward import low_rank_forward
from lora_diffusion.models.forward_overrides import ForwardOverrides
from lora_diffusion.models.load import Base, module_at
from lora_diffusion.training.distillation.trajectories import (
    Contexts,
    DistillationBatch,
    batch_contexts,
    encode_texts,
    predict,
)
from lora_diffusion.training.loop import TrainingTask, run_to_end
from lora_diffusion.training.methods.callbacks import MethodCallbacks
from lora_diffusion.training.optim.optimizers import adam_settings

_CONVERGED_LOSS = 1e-6
"""Relative loss below which only rounding errors remain; Adam would amplify them, so gradients are skipped."""
_MAX_GRADIENT_NORM = 1.0

_TrainableLayers = Mapping[str, LoRALayer]
"""Layers with trainable float32 factors, by module path."""


class _Student(nn.Module):
    """The base with the trainable adapter; its loss is the relative error of its predictions.

    Args:
        base: The base, inside `_trainable_adapter`.
        layers: The trainable layers.
        contexts: Conditioning by text.
        effect: Mean squared difference between the predictions of teacher and base.
    """

    def __init__(self, base: Base, layers: _TrainableLayers, contexts: Contexts, effect: float) -> None:
        super().__init__()
        self.base, self.contexts, self.effect = base, contexts, effect
        self.factors: dict[str, nn.Parameter] = {
            f"{path}.{name}": factor
            for path, layer in layers.items()
            for name, factor in layer.factors.items()
            if isinstance(factor, nn.Parameter)
        }
        self.registered = nn.ParameterList(self.factors.values())  # so that DDP finds the parameters
        self.converged = False
        """Whether the last loss was a rounding error."""

    def forward(self, **batch: Any) -> Tensor:
        """Compute the losses (n,); the batch has the fields of `DistillationBatch`."""
        errors = _squared_error(self.base, DistillationBatch(**batch), self.contexts)
        losses = errors.mean(dim=(1, 2, 3)) / self.effect
        self.converged = float(losses.detach().mean()) <= _CONVERGED_LOSS
        return losses


class _SkipConvergedSteps(MethodCallbacks):
    """Drops all gradients in steps whose loss is a rounding error, which Adam would amplify."""

    def __init__(self, student: _Student) -> None:
        self.student = student

    def frozen_parameters(self, step: int) -> Iterable[nn.Parameter]:  # noqa: ARG002 (depends on the loss)
        """Return all factors if the student has converged."""
        return self.student.parameters() if self.student.converged else ()


def train_student(
    base: Base, start: Adapter, pairs: DistillationBatch, effect: float, config: DistillConfig, backup: Backup
) -> Adapter:
    """Train an adapter to reproduce the teacher's predictions, with Adam and a cosine learning-rate schedule.

    Args:
        base: The base; it is restored afterwards.
        start: The adapter to start from.
        pairs: The teacher's inputs and predictions.
        effect: Mean squared difference between the predictions of teacher and base. The loss is divided by it, so that
            gradient clipping does not depend on how strong the blend is.
        config: Settings of the distillation.
        backup: Where the base's original weights are restored from; see `weight_patch`.

    Returns:
        The adapter after the last step, on the CPU.

    Raises:
        TrainingError: If the loss is not finite.
    """
    size = config.batch_size
    order = picture_order(len(pairs), config.steps * size, config.seed)
    with _trainable_adapter(base, start, backup) as trainable:
        contexts = encode_texts(base, pairs.texts, config.resolution or base.size_px)
        student = _Student(base, trainable, contexts, effect)
        run_to_end(
            TrainingTask(
                name="distill",
                model=student,
                parameters=student.factors,
                batches=lambda step: [(vars(pairs.take(order[step * size : (step + 1) * size])), 1.0)],
                steps=config.steps,
                optimizer=adam_settings(config.learning_rate, _MAX_GRADIENT_NORM),
                callbacks=_SkipConvergedSteps(student),
            )
        )
        return replace(start, layers={**start.layers, **{path: _detach(layer) for path, layer in trainable.items()}})


@contextmanager
def _trainable_adapter(base: Base, start: Adapter, backup: Backup) -> Generator[_TrainableLayers]:
    """Apply an adapter to the base while the context is active, with its LoRA layers in the UNet trainable.

    Trainable layers are added in the forward pass; the rest of the adapter is merged into the weights.

    Raises:
        ConfigError: If a blend is already applied to the base.
    """
    lora_layers = {p: x for p, x in start.layers.items() if is_unet_path(p) and isinstance(x, LoRALayer)}
    trainable = {path: _make_trainable(layer, base.device) for path, layer in lora_layers.items()}
    rest = replace(start, layers={path: layer for path, layer in start.layers.items() if path not in trainable})
    with blended_weights(base, Blend(entries=(WeightedAdapter(adapter=rest),)), backup=backup), ExitStack() as stack:
        forwards = ForwardOverrides()
        stack.callback(forwards.restore)
        for path, layer in trainable.items():
            module = module_at(base, path)
            forwards.add(module, partial(_forward_delta, module, layer))
        yield trainable


def _forward_delta(module: nn.Module, layer: LoRALayer, x: Tensor) -> Tensor:
    """Compute what a trainable layer adds to the output of its module, in the dtype of the input."""
    return low_rank_forward(module, x, layer.down.to(x.dtype), layer.up.to(x.dtype), scale=layer.scale)


def _make_trainable(layer: LoRALayer, device: torch.device) -> LoRALayer:
    """Return a copy of a layer with trainable float32 factors."""
    copies = {name: factor.to(device, torch.float32, copy=True) for name, factor in layer.factors.items()}
    return layer.with_factors({name: nn.Parameter(factor) for name, factor in copies.items()})


def _detach(layer: LoRALayer) -> LoRALayer:
    """Return a copy of a trained layer without gradients, on the CPU."""
    return layer.with_factors({name: factor.detach().cpu() for name, factor in layer.factors.items()})


@torch.no_grad()
def mean_squared_error(base: Base, pairs: DistillationBatch, config: DistillConfig) -> float:
    """Return the mean squared difference between the base's predictions, in its current state, and the teacher's."""
    contexts = encode_texts(base, pairs.texts, config.resolution or base.size_px)
    sums = torch.stack([_squared_error(base, batch, contexts).sum() for batch in pairs.batches(config.batch_size)])
    return float(sums.double().sum()) / pairs.predictions.numel()


def _squared_error(base: Base, pairs: DistillationBatch, contexts: Contexts) -> Tensor:
    """Return the squared difference between the predictions of base and teacher, (n, c, h, w), differentiable."""
    context = batch_contexts(contexts, pairs.texts)
    return (predict(base, pairs.latents, pairs.timesteps, context) - pairs.predictions).square()


def adapter_error(
    base: Base, adapter: Adapter, pairs: DistillationBatch, config: DistillConfig, backup: Backup
) -> float:
    """Return `mean_squared_error` of the base with an adapter merged into its weights; the base is restored."""
    with blended_weights(base, Blend(entries=(WeightedAdapter(adapter=adapter),)), backup=backup):
        return mean_squared_error(base, pairs, config)
