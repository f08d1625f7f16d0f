"""Combine the adapters of a blend during denoising: as a sum or by LoRA Switch, Composite, K-LoRA, NP-LoRA or region.

`composition_context` prepares a base for one image size and yields a hook to call before each denoising step. All modes
are built from sums of deltas: one sum for the whole run (`sum`, `np-lora`), one per step (`switch`, `k-lora`), one per
sample of a batch (`composite`), or one per region. Text encoders always get the deltas of all adapters, except that
adapters with a region are added to the text encoders for their own region only; the prompt is then encoded once per
region. Prompts are encoded once, before the first step.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lora_diffusion.adapters.blend import Blend, BlendSum, WeightedAdapter, blend_sum, filter_modules, merge_sums
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.compatibility import validate_composition
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.adapters.masks import region_mask
from lora_diffusion.algebra.combine.np_lora import project_entries
from lora_diffusion.config.preset import Composition
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.in_place import (
    Backup,
    is_quantized,
    validate_blend,
    weight_at,
    weight_patch,
)
from lora_diffusion.inference.open_patches import has_open_patch
from lora_diffusion.inference.parallel import ParallelPatch, parallel_patch
from lora_diffusion.inference.regional import RegionalDelta, check_spatial, regional_patch
from lora_diffusion.models.forward_overrides import ForwardOverrides
from lora_diffusion.models.load import Base

EncodePrompt = Callable[[], Tensor]
"""Encodes the prompt with the text encoders in their current state; returns hidden states in the UNet's batch order."""
BeforeStep = Callable[[DenoisingStep, EncodePrompt], None]
"""Hook called before each denoising step; it updates the deltas in the base."""
WriteDeltas = Callable[[BlendSum], None]
"""Replaces the deltas in the base by the given ones."""


@contextmanager
def composition_context(
    base: Base, blend: Blend, composition: Composition, size: tuple[int, int], *, backup: Backup = "memory"
) -> Generator[BeforeStep]:
    """Prepare a base for images of one size; the base is restored when the context exits.

    Args:
        base: Base model to apply the blend to.
        blend: Adapters, with their weights and regions.
        composition: How the adapters are combined.
        size: Height and width of the latents.
        backup: Where the original values of changed parameters come from; see `weight_patch`.

    Yields:
        The hook to call before each denoising step.

    Raises:
        FamilyMismatchError: If an adapter does not fit the base.
        AdapterFormatError: If an adapter contains NaN or infinity.
        ConfigError: If the base is patched already or the blend does not support the composition mode. The base is
            unchanged after each of these errors.
    """
    if has_open_patch(base, "parallel"):
        raise ConfigError(
            f"{base.name}: a parallel patch is open on this base, which the image's recipe would not record; "
            "close the patch first"
        )
    validate_blend(base, blend)
    check_composition(blend, composition)
    with ExitStack() as stack:
        write = _make_writer(base, composition, backup, stack)
        update = _make_step_hook(base, blend, composition, size, write, stack)
        changes_each_step = blend.is_scheduled or composition.mode in ("switch", "k-lora")

        def before_step(denoising_step: DenoisingStep, encode: EncodePrompt) -> None:
            if denoising_step.index == 0 or changes_each_step:
                update(denoising_step, encode)

        yield before_step


def check_composition(blend: Blend, composition: Composition) -> None:
    """Check that the blend can be used with the composition mode.

    Raises:
        ConfigError: If the mode needs another number of adapters, or does not support regions.
    """
    validate_composition(composition, len(blend.active), regions=any(entry.region for entry in blend.entries))


def plan_sums(base: Base, blend: Blend, composition: Composition) -> Callable[[DenoisingStep], BlendSum]:
    """Return a function that computes the sum of deltas for each denoising step.

    Args:
        base: Base model that the deltas are for.
        blend: Adapters without regions.
        composition: Any mode but `composite`, which has no single sum per step.
    """
    entries = tuple(entry for entry in blend.entries if entry in blend.active)
    if composition.mode == "switch":
        return lambda denoising_step: _select_switched(base, entries, denoising_step, composition.switch_every)
    if composition.mode == "k-lora":
        return _KLoraSelector(base, entries[0], entries[1], composition).select
    if composition.mode == "np-lora":
        blend = Blend(entries=(project_entries(entries, composition.projection_strength), *entries[1:]))
    return lambda denoising_step: blend_sum(blend, base.layout, denoising_step)


def single_adapter_sum(base: Base, entry: WeightedAdapter, denoising_step: DenoisingStep) -> BlendSum:
    """Compute the weighted deltas of one adapter at a denoising step; its region is ignored."""
    return blend_sum(Blend(entries=(replace(entry, region=None),)), base.layout, denoising_step)


def is_unet_path(path: str) -> bool:
    """Return whether a module path belongs to the UNet."""
    return path.startswith("unet.")


def is_text_encoder_path(path: str) -> bool:
    """Return whether a module path belongs to a text encoder."""
    return not is_unet_path(path)


def _make_step_hook(
    base: Base, blend: Blend, composition: Composition, size: tuple[int, int], write: WriteDeltas, stack: ExitStack
) -> BeforeStep:
    """Return the hook that applies the deltas of a step as the composition mode requires."""
    if any(entry.region for entry in blend.entries):
        return _regional_hook(base, blend, size, write, stack)
    if composition.mode == "composite":
        return _composite_hook(base, blend, write, stack)
    plan = plan_sums(base, blend, composition)
    return lambda denoising_step, _: write(plan(denoising_step))


def _make_writer(base: Base, composition: Composition, backup: Backup, stack: ExitStack) -> WriteDeltas:
    """Open a weight patch, or a parallel patch if one is requested or the weights are quantized."""
    if composition.parallel or is_quantized(base):
        patch = stack.enter_context(parallel_patch(base))
        return lambda deltas: patch.write([deltas])
    return stack.enter_context(weight_patch(base, backup=backup)).write


def _select_switched(
    base: Base, entries: Sequence[WeightedAdapter], denoising_step: DenoisingStep, switch_every: int
) -> BlendSum:
    """LoRA Switch: one adapter at a time in the UNet, the next one after `switch_every` steps [arXiv:2402.16843]."""
    if not entries:
        return BlendSum(layers={}, biases={})
    active = entries[denoising_step.index // switch_every % len(entries)]
    all_adapters = blend_sum(Blend(entries=tuple(entries)), base.layout, denoising_step)
    return merge_sums(
        [
            filter_modules(single_adapter_sum(base, active, denoising_step), is_unet_path),
            filter_modules(all_adapters, is_text_encoder_path),
        ]
    )


class _KLoraSelector:
    """K-LoRA: choose the subject or the style adapter for each UNet layer and step [arXiv:2502.18461].

    The score of a layer is the sum of its K largest absolute deltas, with K the product of the two ranks. The style's
    score is multiplied by a ramp, `k_lora_slope * t / T + k_lora_start` at step t of T, and by the balance, the sum of
    all absolute deltas of the subject over that of the style, so that the adapter with larger deltas overall does not
    win in every layer. The authors' code counts forward passes instead of steps.
    """

    def __init__(self, base: Base, subject: WeightedAdapter, style: WeightedAdapter, composition: Composition) -> None:
        self.base, self.subject, self.style, self.composition = base, subject, style, composition
        shared = subject.adapter.layers.keys() & style.adapter.layers.keys()
        magnitudes = {path: self._measure_pair(path) for path in sorted(shared) if is_unet_path(path)}
        self.scores = {path: (pair[0].top_k, pair[1].top_k) for path, pair in magnitudes.items()}
        subject_total, style_total = (math.fsum(pair[i].total for pair in magnitudes.values()) for i in (0, 1))
        self.balance = subject_total / style_total if style_total else 1.0

    def _measure_pair(self, path: str) -> "tuple[_LayerMagnitude, _LayerMagnitude]":
        layers = self.subject.adapter.layers[path], self.style.adapter.layers[path]
        k = math.prod(getattr(layer, "rank", 1) for layer in layers)
        weight = weight_at(self.base, path)
        return _measure_magnitude(layers[0], weight, k), _measure_magnitude(layers[1], weight, k)

    def select(self, denoising_step: DenoisingStep) -> BlendSum:
        """Return the deltas of the adapters chosen at one step; layers that only one adapter has are always applied."""
        subject_deltas, style_deltas = (
            single_adapter_sum(self.base, self.subject, denoising_step),
            single_adapter_sum(self.base, self.style, denoising_step),
        )
        ramp = (
            self.composition.k_lora_slope * denoising_step.index / denoising_step.total + self.composition.k_lora_start
        )
        style_paths = {path for path, (subject, style) in self.scores.items() if subject < style * self.balance * ramp}
        subject_paths = self.scores.keys() - style_paths
        return merge_sums(
            [
                filter_modules(subject_deltas, lambda path: path not in style_paths),
                filter_modules(style_deltas, lambda path: path not in subject_paths),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class _LayerMagnitude:
    """Absolute deltas of one layer: their sum, and the sum of the K largest."""

    total: float
    top_k: float


def _measure_magnitude(layer: Layer, weight: Tensor, k: int) -> _LayerMagnitude:
    deltas = sum_deltas([(1.0, layer)], weight).abs().flatten()  # on the device of the base's weight
    largest = deltas.topk(min(k, deltas.numel())).values
    return _LayerMagnitude(total=float(deltas.sum()), top_k=float(largest.sum()))


def _composite_hook(base: Base, blend: Blend, write_text_encoders: WriteDeltas, stack: ExitStack) -> BeforeStep:
    """LoRA Composite: average the predictions of the single adapters, computed in one batch [arXiv:2402.16843]."""
    entries = [entry for entry in blend.entries if entry in blend.active]
    if not entries:
        return lambda _, __: None
    # Not `parallel_patch`: the text encoders may be in a parallel patch of their own on the same base.
    patch = ParallelPatch(base)
    stack.callback(patch.undo)
    unet = base.pipe.unet
    original_forward = unet.forward
    count = len(entries)

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        conditions = kwargs.pop("added_cond_kwargs", None)
        if conditions is not None:
            kwargs["added_cond_kwargs"] = {
                name: _repeat_interleave(tensor, count) for name, tensor in conditions.items()
            }
        result = original_forward(
            _repeat_interleave(sample, count), timestep, _repeat_interleave(encoder_hidden_states, count), **kwargs
        )
        predictions = result[0]
        mean = predictions.unflatten(0, (-1, count)).mean(dim=1)
        return (mean,) if isinstance(result, tuple) else type(result)(sample=mean)

    def before_step(denoising_step: DenoisingStep, _encode: EncodePrompt) -> None:
        patch.write(
            [filter_modules(single_adapter_sum(base, entry, denoising_step), is_unet_path) for entry in entries]
        )
        write_text_encoders(filter_modules(blend_sum(blend, base.layout, denoising_step), is_text_encoder_path))

    forwards = ForwardOverrides()
    stack.callback(forwards.restore)
    forwards.replace(unet, forward)
    return before_step


def _repeat_interleave(tensor: Tensor, count: int) -> Tensor:
    """Repeat each sample `count` times, copies adjacent, so that copy i of each sample gets the deltas of blend i."""
    return tensor.repeat_interleave(count, dim=0)


def _regional_hook(base: Base, blend: Blend, size: tuple[int, int], write: WriteDeltas, stack: ExitStack) -> BeforeStep:
    """Apply each adapter with a region in that region only, and the sum of the other adapters everywhere.

    If adapters with a region change text encoders, the prompt is encoded once per region and once without regions.
    """
    regional = [entry for entry in blend.entries if entry.region and entry in blend.active]
    masks = [region_mask(entry.region) for entry in regional if entry.region]
    everywhere = Blend(entries=tuple(entry for entry in blend.entries if not entry.region))
    patch = stack.enter_context(regional_patch(base, size))
    prompts: list[Tensor | None] = []

    def before_step(denoising_step: DenoisingStep, encode: EncodePrompt) -> None:
        regional_sums = [single_adapter_sum(base, entry, denoising_step) for entry in regional]
        for deltas in regional_sums:
            check_spatial(deltas)
        common_deltas = blend_sum(everywhere, base.layout, denoising_step)
        text_sums = [filter_modules(deltas, is_text_encoder_path) for deltas in regional_sums]
        patch.undo()
        if denoising_step.index == 0:
            prompts[:] = _encode_prompt_per_region(common_deltas, text_sums, write, encode)
        write(merge_sums([common_deltas, *text_sums]))
        unet_sums = [filter_modules(deltas, is_unet_path) for deltas in regional_sums]
        patch.apply(
            [
                RegionalDelta(deltas=deltas, mask=mask, prompt=prompt)
                for deltas, mask, prompt in zip(unet_sums, masks, prompts[1:], strict=True)
            ],
            prompts[0],
        )

    return before_step


def _encode_prompt_per_region(
    common_deltas: BlendSum, text_sums: Sequence[BlendSum], write: WriteDeltas, encode: EncodePrompt
) -> list[Tensor | None]:
    """Encode the prompt for the image outside all regions and for each region.

    Returns:
        The hidden states outside all regions, then those of each region; all None if no region changes a text encoder.
    """
    if not any(deltas.names for deltas in text_sums):
        return [None] * (1 + len(text_sums))
    prompts: list[Tensor | None] = []
    for sums in ([common_deltas], *([common_deltas, deltas] for deltas in text_sums)):
        write(merge_sums(sums))
        prompts.append(encode())
    return prompts
