"""What a composed blend adds on the mean over a sampling run, and a sum of adapters at a given rank.

Where every step, or every sample of a batch, has a sum of its own, the mean of those is what one sum can do to first
order: for switch and composite the weights divided by the number of adapters.
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
    """The blend as if it were a plain sum: all adapters at once, whatever the mode, their schedules at 1."""
    entries = tuple(replace(entry, weight=without_schedules(entry.weight)) for entry in blend.entries)
    return blend_sum(Blend(entries=entries), base.layout)


def record_mean_sum(base: Base, blend: Blend, composition: Composition, steps: int) -> BlendSum:
    """The mean of the sums that the base holds over a run. The text encoders hold the whole sum at every step.

    Raises ConfigError as `composition_context` does.
    """
    moments = [DenoisingStep(index=step, total=steps) for step in range(steps)]
    if composition.mode == "composite":
        return average_sums(
            [lane for denoising_step in moments for lane in per_sample_sums(base, blend, denoising_step)]
        )
    return average_sums(list(map(plan_sums(base, blend, composition), moments)))


def per_sample_sums(base: Base, blend: Blend, denoising_step: DenoisingStep) -> list[BlendSum]:
    """What each sample of a composite's batch has: one adapter in the UNet, all in the text encoders."""
    text = filter_modules(blend_sum(blend, base.layout, denoising_step), is_text_encoder_path)
    return [
        merge_sums([filter_modules(single_adapter_sum(base, entry, denoising_step), is_unet_path), text])
        for entry in blend.active
    ]


def average_sums(sums: Sequence[BlendSum]) -> BlendSum:
    """Each layer and bias once, with the mean of its coefficients."""
    total = merge_sums(sums)
    return BlendSum(
        layers={path: average_terms(terms, len(sums)) for path, terms in total.layers.items()},
        biases={path: average_terms(terms, len(sums)) for path, terms in total.biases.items()},
    )


def average_terms(terms: Sequence[tuple[float, T]], count: int) -> tuple[tuple[float, T], ...]:
    """Terms of the very same layer as one; the coefficients over `count`."""
    kept: dict[int, tuple[float, T]] = {}
    for coefficient, layer in terms:
        before = kept[id(layer)][0] if id(layer) in kept else 0.0
        kept[id(layer)] = (before + coefficient, layer)
    return tuple((coefficient / count, layer) for coefficient, layer in kept.values())


def compress_sum(base: Base, total: BlendSum, rank: int, metadata: AdapterMetadata) -> Adapter:
    """A sum as one adapter: plain LoRA at most of that rank, closest in the Frobenius norm; norms and biases whole."""
    return Adapter(
        layers={path: compress_layer(base, path, terms, rank) for path, terms in total.layers.items()},
        biases={
            path: compute_blended_bias(torch.zeros_like(terms[0][1]), terms).cpu()
            for path, terms in total.biases.items()
        },
        metadata=metadata,
    )


def compress_layer(base: Base, path: str, terms: Sequence[Term], rank: int) -> Layer:
    own, shape = weight_at(base, path), weight_shape(module_at(base, path))
    if len(shape) == 1:
        return FullLayer(diff=sum_deltas(terms, own).cpu())
    layer = truncate_spectrum(replace(spectrum_of(terms, own), shape=shape), rank)
    return layer.with_factors({name: factor.cpu() for name, factor in layer.factors.items()})
