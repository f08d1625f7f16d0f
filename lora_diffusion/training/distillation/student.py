"""The base with one LoRA that learns to predict what pairs say, and how far from that a base predicts."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.inference.composition import is_unet_path
from lora_diffusion.inference.in_place import Backup, blended_weights
from lora_diffusion.inference.parallel import Forward, ForwardOverrides, convolve_per_sample
from lora_diffusion.models.load import Base, module_at
from lora_diffusion.training.checks import check_finite
from lora_diffusion.training.distillation.trajectories import (
    Contexts,
    DistillationBatch,
    batch_contexts,
    encode_texts,
    predict,
)
from lora_diffusion.training.seeding import picture_order

NOTHING_LEFT = 1e-6
"""Relative error below which a student is the teacher but for rounding, after which Adam would only walk about."""
MAX_GRADIENT_NORM = 1.0

Learners = Mapping[str, LoRALayer]
"""Layers whose factors learn, float32, by module path."""


def train_student(
    base: Base, start: Adapter, pairs: DistillationBatch, effect: float, config: DistillConfig, backup: Backup
) -> Adapter:
    """The adapter after all steps. Raises TrainingError if a loss is not finite.

    Adam, whose rate falls to 0 by a cosine; the loss is over the blend's effect, a mean square, so that clipping means
    the same for loud and quiet adapters.
    """
    size = config.batch_size
    order = picture_order(len(pairs), config.steps * size, config.seed)
    with trainable_adapter(base, start, backup) as learners:
        contexts = encode_texts(base, pairs.texts, config.resolution or base.size_px)
        factors = [factor for layer in learners.values() for factor in layer.factors.values()]
        optimizer = torch.optim.Adam(factors, lr=config.learning_rate)
        schedule = CosineAnnealingLR(optimizer, config.steps)
        for step in tqdm(range(config.steps), desc="distill", unit="step"):
            batch = pairs.take(order[step * size : (step + 1) * size])
            loss = squared_error(base, batch, contexts).mean() / effect
            check_finite(loss.detach(), step + 1)
            optimizer.zero_grad()
            if float(loss.detach()) > NOTHING_LEFT:
                loss.backward()
                nn.utils.clip_grad_norm_(factors, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
        return replace(start, layers={**start.layers, **{path: detach(layer) for path, layer in learners.items()}})


@contextmanager
def trainable_adapter(base: Base, start: Adapter, backup: Backup) -> Iterator[Learners]:
    """The base with an adapter whose matrices in the UNet learn, in the forward pass; all else of it is in the weights.

    The base is as it was afterwards, whatever happens inside. Raises ConfigError if it holds a blend already.
    """
    matrices = {p: x for p, x in start.layers.items() if is_unet_path(p) and isinstance(x, LoRALayer)}
    learners = {path: make_trainable(layer, base.device) for path, layer in matrices.items()}
    rest = replace(start, layers={path: layer for path, layer in start.layers.items() if path not in learners})
    with blended_weights(base, Blend(entries=(WeightedAdapter(adapter=rest),)), backup=backup), ExitStack() as stack:
        forwards = ForwardOverrides()
        stack.callback(forwards.restore)
        for path, layer in learners.items():
            module = module_at(base, path)
            forwards.replace(module, wrap_with_layer(module, layer))
        yield learners


def wrap_with_layer(module: nn.Module, layer: LoRALayer) -> Forward:
    """The module's forward with a layer added; nothing is written in place, as gradients pass through."""
    own = module.forward

    def linear(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        down, up = layer.down.to(x.dtype), layer.up.to(x.dtype)
        return own(x, *args, **kwargs) + layer.scale * functional.linear(functional.linear(x, down), up)

    def convolution(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        down, up = layer.down.to(x.dtype), layer.up.to(x.dtype)
        return own(x, *args, **kwargs) + layer.scale * functional.conv2d(convolve_per_sample(module, x, down[None]), up)

    return linear if isinstance(module, nn.Linear) else convolution


def make_trainable(layer: LoRALayer, device: torch.device) -> LoRALayer:
    """A copy whose factors learn, float32."""
    copies = {name: factor.to(device, torch.float32, copy=True) for name, factor in layer.factors.items()}
    return layer.with_factors({name: factor.requires_grad_() for name, factor in copies.items()})


def detach(layer: LoRALayer) -> LoRALayer:
    """A copy that has learned, on the CPU."""
    return layer.with_factors({name: factor.detach().cpu() for name, factor in layer.factors.items()})


@torch.no_grad()
def mean_squared_error(base: Base, pairs: DistillationBatch, config: DistillConfig) -> float:
    """Mean squared distance of what the base, as it is, predicts from what the pairs say."""
    contexts = encode_texts(base, pairs.texts, config.resolution or base.size_px)
    total = torch.stack([squared_error(base, part, contexts).sum() for part in pairs.batches(config.batch_size)])
    return float(total.double().sum()) / pairs.predictions.numel()


def squared_error(base: Base, pairs: DistillationBatch, contexts: Contexts) -> Tensor:
    """(n, c, h, w), differentiable."""
    context = batch_contexts(contexts, pairs.texts)
    return (predict(base, pairs.latents, pairs.timesteps, context) - pairs.predictions).square()


def adapter_error(
    base: Base, adapter: Adapter, pairs: DistillationBatch, config: DistillConfig, backup: Backup
) -> float:
    """The distance of the base with one adapter in its weights."""
    with blended_weights(base, Blend(entries=(WeightedAdapter(adapter=adapter),)), backup=backup):
        return mean_squared_error(base, pairs, config)
