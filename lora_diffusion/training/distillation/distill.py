"""Many adapters into one of a given rank, by a short training against what their blend predicts.

For the ways of blending that are no sum (switch, composite, K-LoRA, schedules and routed gates, DoRA), which no algebra
on factors can put into one adapter. The teacher is the base with the composed blend, the student the base with one
LoRA, which starts from the SVD of what the blend adds on the mean over a run and learns to predict the same along the
teacher's own sampling runs (knowledge distillation [arXiv:1503.02531]). What is reported is measured on prompts and
noise that training does not see: the mean squared distance of the predictions, over that between teacher and base.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, cast_adapter
from lora_diffusion.adapters.blend import Blend, BlendSum
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.preset import Composition
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError, TrainingError
from lora_diffusion.inference.composition import check_composition, composition_context, is_unet_path
from lora_diffusion.inference.in_place import Backup, validate_blend, weight_shape
from lora_diffusion.library.recipe import blend_entries, library_versions
from lora_diffusion.models.load import Base, module_at, prediction_type
from lora_diffusion.training.distillation.mean_delta import compress_sum, plain_sum, record_mean_sum
from lora_diffusion.training.distillation.student import adapter_error, mean_squared_error, train_student
from lora_diffusion.training.distillation.trajectories import DistillationBatch, make_runs, record_runs
from lora_diffusion.training.seeding import picture_order

HELD_OUT_SHARE = 4
"""One prompt of so many is held out."""
ROUNDING = 1e-10
"""Share of the predictions' mean square below which two are the same but for the order of float32 arithmetic."""


@dataclass(frozen=True, kw_only=True)
class DistillReport:
    """How close one adapter comes to the blend on held-out prompts and noise.

    Errors are mean squared distances of predictions from the blend's, over those of the base from the blend's: 0 is the
    blend, 1 no better than the base.
    """

    plain_error: float
    """Of the plain sum of the adapters, by SVD at the same rank."""
    start_error: float
    """Of the mean of the sums over a run, by SVD at the same rank; training starts there."""
    error: float
    """Of the distilled adapter, as it is saved."""
    learned_from: int
    """Number of predictions that training saw."""
    measured_on: int
    """Number of predictions that were held out."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """The adapter, how close it comes, and how long that took."""

    adapter: Adapter
    report: DistillReport
    seconds: float


def distill(
    base: Base,
    blend: Blend,
    composition: Composition,
    prompts: Sequence[str],
    config: DistillConfig,
    *,
    backup: Backup = "memory",
) -> DistillResult:
    """One adapter that does what the composed blend does, at most of rank `config.rank`.

    Matrices of the UNet learn; what the adapters do to text encoders is compressed, and to norms and biases kept, as
    the mean over a run. One seed gives one adapter on the CPU. The base is as it was afterwards. Raises ConfigError,
    FamilyMismatchError and AdapterFormatError before anything is computed, TrainingError for a blend that predicts NaN
    or a loss that is not finite.
    """
    started = time.perf_counter()
    check_distillable(base, blend, composition, config)
    whole, mean = plain_sum(base, blend), record_mean_sum(base, blend, composition, config.sampler_steps)
    check_learnable(base, mean)
    training, held_out = record_teacher(base, blend, composition, prompts, config, backup)
    untouched = measure_effect(base, held_out, config)
    metadata = make_metadata(base, blend, composition)
    plain, start = (compress_sum(base, total, config.rank, metadata) for total in (whole, mean))
    factors = train_student(base, start, training, untouched, config, backup)
    learned = cast_adapter(factors, torch_dtype(config.save_precision))
    errors = [adapter_error(base, adapter, held_out, config, backup) / untouched for adapter in (plain, start, learned)]
    report = DistillReport(
        plain_error=errors[0],
        start_error=errors[1],
        error=errors[2],
        learned_from=len(training),
        measured_on=len(held_out),
    )
    record = {
        **config.model_dump(mode="json"),
        **describe_sources(blend, composition, training, held_out),
        **vars(report),
    }
    return DistillResult(
        adapter=replace(learned, metadata=metadata.model_copy(update={"training": record})),
        report=report,
        seconds=time.perf_counter() - started,
    )


def check_distillable(base: Base, blend: Blend, composition: Composition, config: DistillConfig) -> None:
    """Raise what `distill` raises before it begins."""
    if not blend.active:
        raise ConfigError("there is nothing to distill; give at least one adapter with a weight other than 0")
    placed = [entry.name for entry in blend.entries if entry.region]
    if placed:
        raise ConfigError(f"{placed[0]}: acts in a region, and one adapter acts everywhere; leave the region out")
    words = [word for entry in blend.active for word in entry.adapter.tokens]
    if words:
        raise ConfigError(f"the learned words {', '.join(words)} cannot be distilled; convert --without-tokens first")
    validate_blend(base, blend)
    check_composition(blend, composition)
    most = int(base.pipe.scheduler.config.num_train_timesteps)
    if config.sampler_steps > most:
        raise ConfigError(f"'sampler_steps' is {config.sampler_steps}; {base.name} knows {most} timesteps, use fewer")


def check_learnable(base: Base, total: BlendSum) -> None:
    """Raise ConfigError unless there is a linear module or a convolution in the UNet whose LoRA could learn."""
    if not any(is_unet_path(path) and len(weight_shape(module_at(base, path))) > 1 for path in total.layers):
        raise ConfigError("none of the adapters changes a matrix of the UNet; there is nothing to distill")


def record_teacher(
    base: Base, blend: Blend, composition: Composition, prompts: Sequence[str], config: DistillConfig, backup: Backup
) -> tuple[DistillationBatch, DistillationBatch]:
    """What the blend predicts along runs to learn from, and along runs to measure with."""
    learned, held_out = split_prompts(prompts, config)
    side = (config.resolution or base.size_px) // int(base.pipe.vae_scale_factor)
    with composition_context(base, blend, composition, (side, side), backup=backup) as before_step:
        training, testing = (
            record_runs(base, before_step, make_runs(texts, count=config.runs, seed=config.seed + i), config)
            for i, texts in enumerate((learned, held_out))
        )
    if not bool(training.predictions.isfinite().all() and testing.predictions.isfinite().all()):
        raise TrainingError("the blend predicts NaN or infinity along its sampling runs; lower the adapters' weights")
    return training, testing


def split_prompts(prompts: Sequence[str], config: DistillConfig) -> tuple[list[str], list[str]]:
    """Prompts to learn from, and others to measure with, unless there is but one.

    Raises ConfigError if there is none, or one with a tag.
    """
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        raise ConfigError("there are no prompts to distill on; give at least one")
    tagged = next((prompt for prompt in distinct if "<lora:" in prompt), "")
    if tagged:
        raise ConfigError(f"the prompt {tagged!r} has a tag in it; give adapters with --adapter and prompts without")
    drawn = [distinct[i] for i in picture_order(len(distinct), len(distinct), config.seed)][: config.most_prompts]
    held_out = max(1, len(drawn) // HELD_OUT_SHARE)
    return drawn[:-held_out] or drawn, drawn[-held_out:]


def measure_effect(base: Base, pairs: DistillationBatch, config: DistillConfig) -> float:
    """Mean square of what the blend adds to the base's own predictions. Raises ConfigError if that is nothing."""
    effect = mean_squared_error(base, pairs, config)
    if effect <= ROUNDING * float(pairs.predictions.square().mean()):
        raise ConfigError("the blend changes nothing that the base predicts; there is nothing to distill")
    return effect


def make_metadata(base: Base, blend: Blend, composition: Composition) -> AdapterMetadata:
    """What is known of the adapter before it is made. No date, as the same seed is to give the same file."""
    entries = [entry for entry in blend.entries if entry in blend.active]
    words = [word for entry in entries for word in entry.adapter.metadata.trigger_words]
    return AdapterMetadata(
        name=" + ".join(entry.name for entry in entries),
        family=base.family.name,
        variant="v-prediction" if prediction_type(base) == "v_prediction" else "",
        base_name=base.name,
        base_hash=base.hash,
        trigger_words=tuple(dict.fromkeys(words)),
        description=f"Distilled from {len(entries)} adapters composed by {composition.mode}.",
        merged_from=tuple(entry.hash for entry in entries),
    )


def describe_sources(
    blend: Blend, composition: Composition, training: DistillationBatch, held_out: DistillationBatch
) -> dict[str, Any]:
    """What the adapter was made from, for its record."""
    return {
        "adapters": [entry.model_dump(mode="json", exclude={"path"}) for entry in blend_entries(blend)],
        "composition": composition.model_dump(mode="json", exclude_defaults=True),
        "learned_prompts": list(dict.fromkeys(filter(None, training.texts))),
        "held_out_prompts": list(dict.fromkeys(filter(None, held_out.texts))),
        "versions": library_versions(),
    }
