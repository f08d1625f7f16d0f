"""The mean delta of a composed blend over a sampling run, and its truncation to a given rank.

Some composition modes apply different weighted sums of deltas at different steps (switch) or to different samples of a
batch (composite). Their mean is the best first-order approximation by a single sum. For switch and composite it is the
weighted sum divided by the number of adapters.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, BlendSum, blend_sum, filter_modules, merge_sums
from lora_diffusion.adapters.coefficients import DenoisingStep, without_schedules
from lora_diffusion.adapters.deltas import compute_blended_bias, sum_deltas
from lora_diffusion.adapters.factor_stack import Term
from lora_diffusion.adapters.layers import FullLayer, Layer
from lora_diffusion.algebra.svd.svd import spectrum_of, truncate_spectrum
from lora_diffusion.config.preset import Composition
from lora_diffusion.inference.composition import is_text_encoder_path, is_unet_path, plan_sums, single_adapter_sum
from lora_diffusion.inference.in_place import weight_at, weight_shape
from lora_diffusion.models.load import Base, module_at

T = TypeVar("T")


def plain_sum(base: Base, blend: Blend) -> BlendSum:
    """Return the weighted sum of all adapters' deltas, ignoring composition and schedules."""
    entries = tuple(replace(entry, weight=without_schedules(entry.weight)) for entry in blend.entries)
    return blend_sum(Blend(entries=entries), base.layout)


def record_mean_sum(base: Base, blend: Blend, composition: Composition, steps: int) -> BlendSum:
    """Return the mean over a sampling run of the sums that a composed blend applies to the base.

    In the text encoders all adapters are active at every step.

    Args:
        base: The base.
        blend: The adapters with their weights.
        composition: How the adapters are composed.
        steps: Number of denoising steps of the run.

    Raises:
        ConfigError: If the composition does not fit the blend.
    """
    denoising_steps = [DenoisingStep(index=step, total=steps) for step in range(steps)]
    if composition.mode == "composite":
        return _average_sums([each for step in denoising_steps for each in _per_sample_sums(base, blend, step)])
    return _average_sums(list(map(plan_sums(base, blend, composition), denoising_steps)))


def _per_sample_sums(base: Base, blend: Blend, denoising_step: DenoisingStep) -> list[BlendSum]:
    """Return the sum for each sample of a composite's batch: one adapter in the UNet, all in the text encoders."""
    text = filter_modules(blend_sum(blend, base.layout, denoising_step), is_text_encoder_path)
    return [
        merge_sums([filter_modules(single_adapter_sum(base, entry, denoising_step), is_unet_path), text])
        for entry in blend.active
    ]


def _average_sums(sums: Sequence[BlendSum]) -> BlendSum:
    """Return the mean of several sums, with each layer and bias once."""
    merged = merge_sums(sums)
    return BlendSum(
        layers={path: _average_terms(terms, len(sums)) for path, terms in merged.layers.items()},
        biases={path: _average_terms(terms, len(sums)) for path, terms in merged.biases.items()},
    )


def _average_terms(terms: Sequence[tuple[float, T]], count: int) -> tuple[tuple[float, T], ...]:
    """Combine the terms that refer to the same layer object, and divide all coefficients by `count`."""
    by_id: dict[int, tuple[float, T]] = {}
    for coefficient, layer in terms:
        previous = by_id[id(layer)][0] if id(layer) in by_id else 0.0
        by_id[id(layer)] = (previous + coefficient, layer)
    return tuple((coefficient / count, layer) for coefficient, layer in by_id.values())


def compress_sum(base: Base, deltas: BlendSum, rank: int, metadata: AdapterMetadata) -> Adapter:
    """Turn a sum of deltas into one adapter of plain LoRA layers by truncated SVD.

    Args:
        base: The base; some layers, such as DoRA, need its weights to compute their deltas.
        deltas: The sum.
        rank: Largest rank of a layer. Each layer is the best approximation of that rank in the Frobenius norm. Deltas
            of one-dimensional weights (normalization layers) and biases are kept at full size.
        metadata: Metadata of the adapter.
    """
    return Adapter(
        layers={path: _compress_layer(base, path, terms, rank) for path, terms in deltas.layers.items()},
        biases={
            path: compute_blended_bias(torch.zeros_like(terms[0][1]), terms).cpu()
            for path, terms in deltas.biases.items()
        },
        metadata=metadata,
    )


def _compress_layer(base: Base, path: str, terms: Sequence[Term], rank: int) -> Layer:
    """Truncate the sum of one module's deltas to a rank."""
    base_weight, shape = weight_at(base, path), weight_shape(module_at(base, path))
    if len(shape) == 1:
        return FullLayer(diff=sum_deltas(terms, base_weight).cpu())
    layer = truncate_spectrum(replace(spectrum_of(terms, base_weight), shape=shape), rank)
    return layer.with_factors({name: factor.cpu() for name, factor in layer.factors.items()})
