"""Distill a blend of adapters into one LoRA of a given rank, by knowledge distillation [arXiv:1503.02531].

This is for blends that are not a weighted sum of deltas (switch, composite, K-LoRA, schedules, routed gates, DoRA) and
therefore cannot be merged into one adapter by algebra on the factors alone. The teacher is the base with the blend; the
student is the base with one LoRA. The LoRA is initialized with the truncated SVD of the blend's mean delta over a
sampling run, and trained to predict the same as the teacher along the teacher's own sampling runs. The reported error
is measured on held-out prompts and noise: the mean squared difference between the predictions of student and teacher,
over that between base and teacher.
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
from lora_diffusion.data.sampler import picture_order
from lora_diffusion.errors import ConfigError, TrainingError
from lora_diffusion.inference.composition import check_composition, composition_context, is_unet_path
from lora_diffusion.inference.in_place import Backup, validate_blend, weight_shape
from lora_diffusion.library.recipe import blend_entries, library_versions
from lora_diffusion.models.load import Base, module_at, prediction_type
from lora_diffusion.training.distillation.mean_delta import compress_sum, plain_sum, record_mean_sum
from lora_diffusion.training.distillation.student import adapter_error, mean_squared_error, train_student
from lora_diffusion.training.distillation.trajectories import DistillationBatch, make_runs, record_runs

_HELD_OUT_DIVISOR = 4
"""One out of this many prompts is held out for measuring."""
_ROUNDING_ERROR = 1e-10
"""Relative mean squared difference below which two predictions differ by float32 rounding only."""


@dataclass(frozen=True, kw_only=True)
class DistillReport:
    """Errors of the distilled adapter and of two baselines, measured on held-out prompts and noise.

    An error is the mean squared difference between an adapter's predictions and the blend's, divided by that between
    the base's predictions and the blend's: 0 means identical to the blend, 1 means no better than the base.
    """

    plain_error: float
    """Error of the adapters' weighted sum, truncated to the same rank by SVD."""
    start_error: float
    """Error of the blend's mean delta over a sampling run, truncated to the same rank by SVD; training starts there."""
    error: float
    """Error of the distilled adapter, in the precision it is saved in."""
    learned_from: int
    """Number of predictions used for training."""
    measured_on: int
    """Number of held-out predictions."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Result of a distillation."""

    adapter: Adapter
    """The distilled adapter, with metadata about its making."""
    report: DistillReport
    """How close it comes to the blend."""
    seconds: float
    """Time that the distillation took."""


def distill(
    base: Base,
    blend: Blend,
    composition: Composition,
    prompts: Sequence[str],
    config: DistillConfig,
    *,
    backup: Backup = "memory",
) -> DistillResult:
    """Distill a blend into one adapter.

    Only linear and convolution layers of the UNet are trained. Deltas of text encoders are truncated to the same rank
    by SVD; deltas of normalization layers and biases are kept at full size. Both are means over a sampling run. On the
    CPU the same seed gives the same adapter. The base is restored afterwards.

    Args:
        base: The base.
        blend: The adapters with their weights.
        composition: How the adapters are composed, such as `switch` or `k-lora`.
        prompts: Prompts to sample with; a quarter of them is held out for measuring.
        config: Settings of the distillation, such as rank and number of steps.
        backup: Where the base's original weights are restored from; see `weight_patch`.

    Raises:
        ConfigError: If the blend cannot be distilled, or there are no usable prompts.
        FamilyMismatchError: If an adapter was made for another model family.
        AdapterFormatError: If an adapter does not fit the base.
        TrainingError: If the blend predicts NaN, or the training loss is not finite.
    """
    started = time.perf_counter()
    _check_distillable(base, blend, composition, config)
    plain_deltas = plain_sum(base, blend)
    mean_deltas = record_mean_sum(base, blend, composition, config.num_inference_steps)
    _check_learnable(base, mean_deltas)
    training, held_out = record_teacher(base, blend, composition, prompts, config, backup)
    effect = _measure_effect(base, held_out, config)
    metadata = make_distillation_metadata(base, blend, composition)
    plain = compress_sum(base, plain_deltas, config.rank, metadata)
    start = compress_sum(base, mean_deltas, config.rank, metadata)
    student = train_student(base, start, training, effect, config, backup)
    distilled = cast_adapter(student, torch_dtype(config.save_precision))
    errors = [adapter_error(base, adapter, held_out, config, backup) / effect for adapter in (plain, start, distilled)]
    report = DistillReport(
        plain_error=errors[0],
        start_error=errors[1],
        error=errors[2],
        learned_from=len(training),
        measured_on=len(held_out),
    )
    record = {
        **config.model_dump(mode="json"),
        **_describe_sources(blend, composition, training, held_out),
        **vars(report),
    }
    return DistillResult(
        adapter=replace(distilled, metadata=metadata.model_copy(update={"training": record})),
        report=report,
        seconds=time.perf_counter() - started,
    )


def _check_distillable(base: Base, blend: Blend, composition: Composition, config: DistillConfig) -> None:
    """Raise ConfigError, FamilyMismatchError or AdapterFormatError if the blend cannot be distilled on this base."""
    if not blend.active:
        raise ConfigError(
            "the blend has no active adapter to distill; give at least one adapter with a weight other than 0"
        )
    regional = [entry.name for entry in blend.entries if entry.region]
    if regional:
        raise ConfigError(
            f"{regional[0]}: is limited to a region, but a distilled adapter acts on the whole image; leave the region "
            "out"
        )
    tokens = [token for entry in blend.active for token in entry.adapter.tokens]
    if tokens:
        raise ConfigError(
            f"textual-inversion embeddings ({', '.join(tokens)}) cannot be distilled; remove them with "
            "convert --without-tokens first"
        )
    validate_blend(base, blend)
    check_composition(blend, composition)
    num_timesteps = int(base.pipe.scheduler.config.num_train_timesteps)
    if config.num_inference_steps > num_timesteps:
        raise ConfigError(
            f"'num_inference_steps' is {config.num_inference_steps}, but {base.name} was trained with {num_timesteps} "
            "timesteps; use at most as many steps"
        )


def _check_learnable(base: Base, deltas: BlendSum) -> None:
    """Raise ConfigError unless the blend changes a linear or convolution layer of the UNet."""
    if not any(is_unet_path(path) and len(weight_shape(module_at(base, path))) > 1 for path in deltas.layers):
        raise ConfigError(
            "none of the adapters changes a linear or convolution layer of the UNet, so there is nothing to distill; "
            "add an adapter that does"
        )


def record_teacher(
    base: Base, blend: Blend, composition: Composition, prompts: Sequence[str], config: DistillConfig, backup: Backup
) -> tuple[DistillationBatch, DistillationBatch]:
    """Record the blend's predictions along sampling runs.

    Args:
        base: The base.
        blend: The adapters with their weights.
        composition: How the adapters are composed.
        prompts: Prompts to sample with.
        config: Settings of the distillation.
        backup: Where the base's original weights are restored from; see `weight_patch`.

    Returns:
        The predictions to train on, and those held out for measuring, from other prompts and other noise.

    Raises:
        ConfigError: If there are no usable prompts.
        TrainingError: If the blend predicts NaN or infinity.
    """
    training_prompts, held_out_prompts = _split_prompts(prompts, config)
    side = (config.resolution or base.size_px) // int(base.pipe.vae_scale_factor)
    with composition_context(base, blend, composition, (side, side), backup=backup) as before_step:
        training, held_out = (
            record_runs(base, before_step, make_runs(texts, count=config.runs, seed=config.seed + i), config)
            for i, texts in enumerate((training_prompts, held_out_prompts))
        )
    if not bool(training.predictions.isfinite().all() and held_out.predictions.isfinite().all()):
        raise TrainingError("the blend predicts NaN or infinity along its sampling runs; lower the adapters' weights")
    return training, held_out


def _split_prompts(prompts: Sequence[str], config: DistillConfig) -> tuple[list[str], list[str]]:
    """Choose up to `config.max_prompts` prompts, and split them into prompts to train on and held-out prompts.

    A single prompt is used for both.
    """
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        raise ConfigError("there are no prompts to distill with; give at least one")
    tagged = next((prompt for prompt in distinct if "<lora:" in prompt), "")
    if tagged:
        raise ConfigError(
            f"the prompt {tagged!r} contains a <lora:...> tag; name adapters with --adapter and remove the tag"
        )
    shuffled = [distinct[i] for i in picture_order(len(distinct), len(distinct), config.seed)]
    chosen = shuffled[: config.max_prompts]
    num_held_out = max(1, len(chosen) // _HELD_OUT_DIVISOR)
    return chosen[:-num_held_out] or chosen, chosen[-num_held_out:]


def _measure_effect(base: Base, batch: DistillationBatch, config: DistillConfig) -> float:
    """Return the mean squared difference between the predictions of blend and base; raise ConfigError if it is zero."""
    effect = mean_squared_error(base, batch, config)
    if effect <= _ROUNDING_ERROR * float(batch.predictions.square().mean()):
        raise ConfigError(
            "the blend does not change the predictions of the base, so there is nothing to distill; check the adapters "
            "and their weights"
        )
    return effect


def make_distillation_metadata(base: Base, blend: Blend, composition: Composition) -> AdapterMetadata:
    """Make the metadata of the distilled adapter.

    It has no creation date, so that the same seed gives the same file.
    """
    entries = [entry for entry in blend.entries if entry in blend.active]
    trigger_words = [word for entry in entries for word in entry.adapter.metadata.trigger_words]
    return AdapterMetadata(
        name=" + ".join(entry.name for entry in entries),
        family=base.family.name,
        variant="v-prediction" if prediction_type(base) == "v_prediction" else "",
        base_name=base.name,
        base_hash=base.hash,
        trigger_words=tuple(dict.fromkeys(trigger_words)),
        description=f"Distilled from {len(entries)} adapters composed by {composition.mode}.",
        merged_from=tuple(entry.hash for entry in entries),
    )


def _describe_sources(
    blend: Blend, composition: Composition, training: DistillationBatch, held_out: DistillationBatch
) -> dict[str, Any]:
    """Describe adapters, composition and prompts for the metadata of the distilled adapter."""
    return {
        "adapters": [entry.model_dump(mode="json", exclude={"path"}) for entry in blend_entries(blend)],
        "composition": composition.model_dump(mode="json", exclude_defaults=True),
        "learned_prompts": list(dict.fromkeys(filter(None, training.texts))),
        "held_out_prompts": list(dict.fromkeys(filter(None, held_out.texts))),
        "versions": library_versions(),
    }
