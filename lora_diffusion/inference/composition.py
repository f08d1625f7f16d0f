"""How the adapters of a blend come together in a picture: all at once, in turn, side by side, chosen, or by region.

`composition_context` prepares a base for one picture and yields the hook to call before each denoising step. The sum is
the default, and the other modes are made of sums too: one per step (`switch`, `k-lora`), one per sample of a batch
(`composite`), or one per region. Text encoders hold the whole sum while the prompt is encoded, once, before the first
step; where regions change the text encoders, it is encoded for each region as well.
"""

import math
from collections.abc import Callable, Iterator, Sequence
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
from lora_diffusion.inference.in_place import Backup, is_quantized, validate_blend, weight_at, weight_patch
from lora_diffusion.inference.parallel import BRANCHED, ForwardOverrides, ParallelPatch, parallel_patch
from lora_diffusion.inference.regional import RegionalDelta, check_spatial, regional_patch
from lora_diffusion.models.load import Base

ReadPrompt = Callable[[], Tensor]
"""Reads the picture's prompt with the text encoders as they are: hidden states in the order of the UNet's batch."""
BeforeStep = Callable[[DenoisingStep, ReadPrompt], None]
Write = Callable[[BlendSum], None]


@contextmanager
def composition_context(
    base: Base, blend: Blend, composition: Composition, size: tuple[int, int], *, backup: Backup = "memory"
) -> Iterator[BeforeStep]:
    """A base for pictures of one size, (height, width) in latents; yields what to call before each denoising step.

    The base is as it was afterwards, whatever happens inside; `backup` says where its own values are kept. Raises
    FamilyMismatchError, AdapterFormatError and ConfigError before anything changes.
    """
    if base in BRANCHED:
        raise ConfigError(f"{base.name} has a branch beside its weights, unknown to any recipe; leave that one first")
    validate_blend(base, blend)
    check_composition(blend, composition)
    with ExitStack() as stack:
        write = make_writer(base, composition, backup, stack)
        put = make_step_hook(base, blend, composition, size, write, stack)
        changing = blend.is_scheduled or composition.mode in ("switch", "k-lora")

        def before_step(denoising_step: DenoisingStep, read: ReadPrompt) -> None:
            if denoising_step.index == 0 or changing:
                put(denoising_step, read)

        yield before_step


def make_step_hook(
    base: Base,
    blend: Blend,
    composition: Composition,
    size: tuple[int, int],
    write: Write,
    stack: ExitStack,
) -> BeforeStep:
    """What puts the blend of a step into the base, in the way that the composition asks for."""
    if any(entry.region for entry in blend.entries):
        return regional_hook(base, blend, size, write, stack)
    if composition.mode == "composite":
        return composite_hook(base, blend, write, stack)
    plan = plan_sums(base, blend, composition)
    return lambda denoising_step, _: write(plan(denoising_step))


def check_composition(blend: Blend, composition: Composition) -> None:
    """Raise ConfigError for a mode that these adapters cannot be in."""
    validate_composition(composition, len(blend.active), regions=any(entry.region for entry in blend.entries))


def make_writer(base: Base, composition: Composition, backup: Backup, stack: ExitStack) -> Write:
    """What puts a sum into the base: its weights, or a branch beside them if asked for or if they are quantized."""
    if composition.exact or is_quantized(base):
        branch = stack.enter_context(parallel_patch(base))
        return lambda total: branch.write([total])
    return stack.enter_context(weight_patch(base, backup=backup)).write


def plan_sums(base: Base, blend: Blend, composition: Composition) -> Callable[[DenoisingStep], BlendSum]:
    """The sum that stands for the blend at each step."""
    entries = tuple(entry for entry in blend.entries if entry in blend.active)
    if composition.mode == "switch":
        return lambda denoising_step: select_switched(base, entries, denoising_step, composition.switch_every)
    if composition.mode == "k-lora":
        return KLoraSelector(base, entries[0], entries[1], composition).select
    if composition.mode == "np-lora":
        blend = Blend(entries=(project_entries(entries, composition.projection), *entries[1:]))
    return lambda denoising_step: blend_sum(blend, base.layout, denoising_step)


def single_adapter_sum(base: Base, entry: WeightedAdapter, denoising_step: DenoisingStep) -> BlendSum:
    """The terms of one adapter, wherever in the picture they act."""
    return blend_sum(Blend(entries=(replace(entry, region=None),)), base.layout, denoising_step)


def is_unet_path(path: str) -> bool:
    return path.startswith("unet.")


def is_text_encoder_path(path: str) -> bool:
    return not is_unet_path(path)


def select_switched(
    base: Base, entries: Sequence[WeightedAdapter], denoising_step: DenoisingStep, every: int
) -> BlendSum:
    """LoRA Switch: one adapter in the UNet at a time, the next after every few steps [arXiv:2402.16843]."""
    if not entries:
        return BlendSum(layers={}, biases={})
    turn = entries[denoising_step.index // every % len(entries)]
    text = blend_sum(Blend(entries=tuple(entries)), base.layout, denoising_step)
    return merge_sums(
        [
            filter_modules(single_adapter_sum(base, turn, denoising_step), is_unet_path),
            filter_modules(text, is_text_encoder_path),
        ]
    )


class KLoraSelector:
    """K-LoRA: at each layer and step the one of two adapters whose largest changes are larger [arXiv:2502.18461].

    A layer's strength is the sum of its K largest absolute changes, K the product of the two ranks. The style's counts
    times slope * t / T + start, t the step's number, and times the ratio of all the subject's changes to all the
    style's, so that the louder adapter does not win everywhere. (The authors' code counts forward passes, not steps.)
    """

    def __init__(self, base: Base, subject: WeightedAdapter, style: WeightedAdapter, composition: Composition) -> None:
        self.base, self.subject, self.style, self.composition = base, subject, style, composition
        both = subject.adapter.layers.keys() & style.adapter.layers.keys()
        pairs = {path: self.measure_pair(path) for path in sorted(both) if is_unet_path(path)}
        self.strengths = {path: (mine.largest, other.largest) for path, (mine, other) in pairs.items()}
        mine, other = (math.fsum(pair[i].whole for pair in pairs.values()) for i in (0, 1))
        self.balance = mine / other if other else 1.0

    def measure_pair(self, path: str) -> "tuple[LayerMagnitude, LayerMagnitude]":
        """How much either adapter changes one layer."""
        layers = self.subject.adapter.layers[path], self.style.adapter.layers[path]
        count = math.prod(getattr(layer, "rank", 1) for layer in layers)
        own = weight_at(self.base, path)
        return measure_magnitude(layers[0], own, count), measure_magnitude(layers[1], own, count)

    def select(self, denoising_step: DenoisingStep) -> BlendSum:
        """The sum at one step."""
        first, second = (
            single_adapter_sum(self.base, self.subject, denoising_step),
            single_adapter_sum(self.base, self.style, denoising_step),
        )
        ramp = (
            self.composition.k_lora_slope * denoising_step.index / denoising_step.total + self.composition.k_lora_start
        )
        styled = {path for path, (mine, other) in self.strengths.items() if mine < other * self.balance * ramp}
        kept = self.strengths.keys() - styled
        return merge_sums(
            [filter_modules(first, lambda p: p not in styled), filter_modules(second, lambda p: p not in kept)]
        )


@dataclass(frozen=True, kw_only=True)
class LayerMagnitude:
    """Absolute changes of one layer: their sum, and that of the K largest."""

    whole: float
    largest: float


def measure_magnitude(layer: Layer, own: Tensor, count: int) -> LayerMagnitude:
    """Computed on the base's device, where its own weight is."""
    changes = sum_deltas([(1.0, layer)], own).abs().flatten()
    largest = changes.topk(min(count, changes.numel())).values
    return LayerMagnitude(whole=float(changes.sum()), largest=float(largest.sum()))


def composite_hook(base: Base, blend: Blend, write_text: Write, stack: ExitStack) -> BeforeStep:
    """LoRA Composite: the mean of what each adapter alone predicts, in one batch [arXiv:2402.16843]."""
    entries = [entry for entry in blend.entries if entry in blend.active]
    if not entries:
        return lambda _, __: None
    branch = ParallelPatch(base)  # beside that of the text encoders, if they have one
    stack.callback(branch.undo)
    unet = base.pipe.unet
    own = unet.forward
    count = len(entries)

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        added = kwargs.pop("added_cond_kwargs", None)
        if added is not None:
            kwargs["added_cond_kwargs"] = {name: repeat_interleave(tensor, count) for name, tensor in added.items()}
        result = own(
            repeat_interleave(sample, count), timestep, repeat_interleave(encoder_hidden_states, count), **kwargs
        )
        predictions = result[0]
        mean = predictions.unflatten(0, (-1, count)).mean(dim=1)
        return (mean,) if isinstance(result, tuple) else type(result)(sample=mean)

    def before_step(denoising_step: DenoisingStep, _read: ReadPrompt) -> None:
        branch.write(
            [filter_modules(single_adapter_sum(base, entry, denoising_step), is_unet_path) for entry in entries]
        )
        write_text(filter_modules(blend_sum(blend, base.layout, denoising_step), is_text_encoder_path))

    forwards = ForwardOverrides()
    stack.callback(forwards.restore)
    forwards.replace(unet, forward)
    return before_step


def repeat_interleave(tensor: Tensor, count: int) -> Tensor:
    """Every sample `count` times, its copies side by side, so that copy i has blend i."""
    return tensor.repeat_interleave(count, dim=0)


def regional_hook(base: Base, blend: Blend, size: tuple[int, int], write: Write, stack: ExitStack) -> BeforeStep:
    """Every adapter with a region acts in it alone; the others act everywhere, as a sum.

    Where regions change text encoders, the prompt is read once for each region, and once for the rest of the picture.
    """
    placed = [entry for entry in blend.entries if entry.region and entry in blend.active]
    masks = [region_mask(entry.region) for entry in placed if entry.region]
    everywhere = Blend(entries=tuple(entry for entry in blend.entries if not entry.region))
    lanes = stack.enter_context(regional_patch(base, size))
    prompts: list[Tensor | None] = []

    def before_step(denoising_step: DenoisingStep, read: ReadPrompt) -> None:
        own = [single_adapter_sum(base, entry, denoising_step) for entry in placed]
        for total in own:
            check_spatial(total)
        common, texts = (
            blend_sum(everywhere, base.layout, denoising_step),
            [filter_modules(total, is_text_encoder_path) for total in own],
        )
        lanes.undo()
        if denoising_step.index == 0:
            prompts[:] = encode_prompt_per_region(common, texts, write, read)
        write(merge_sums([common, *texts]))
        totals = [filter_modules(total, is_unet_path) for total in own]
        parts = zip(totals, masks, prompts[1:], strict=True)
        lanes.apply([RegionalDelta(total=total, mask=mask, prompt=prompt) for total, mask, prompt in parts], prompts[0])

    return before_step


def encode_prompt_per_region(
    common: BlendSum, texts: Sequence[BlendSum], write: Write, read: ReadPrompt
) -> list[Tensor | None]:
    """The prompt as it is read outside of all regions, and in each; None for all if the regions read it alike."""
    if not any(text.names for text in texts):
        return [None] * (1 + len(texts))
    prompts: list[Tensor | None] = []
    for sums in ([common], *([common, text] for text in texts)):
        write(merge_sums(sums))
        prompts.append(read())
    return prompts
