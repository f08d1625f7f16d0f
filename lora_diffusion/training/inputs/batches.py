"""Batches of one process for each optimizer step."""

from collections.abc import Iterator
from typing import Any

from lora_diffusion.training.inputs.samples import TrainingSamples, collate
from lora_diffusion.training.setup import TrainingContext
from lora_diffusion.training.validation import to_device


def make_batches(run: TrainingContext, step: int) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the batches of this process for an optimizer step, each with the weight of its loss.

    Training images come first, then class images if there are any (`prior.mode = "pictures"`). The weights include the
    number of these two groups, because Accelerate divides the loss by the number of batches of both.
    """
    config, accelerator = run.config, run.accelerator
    for samples, weight in zip(run.samples, (1.0, config.prior.weight), strict=False):
        for window in range(config.gradient_accumulation):
            first = (window * accelerator.num_processes + accelerator.process_index) * config.batch_size
            positions = range(first, first + config.batch_size)
            yield _make_training_batch(run, samples, step, positions), weight * len(run.samples)


def _make_training_batch(run: TrainingContext, samples: TrainingSamples, step: int, positions: range) -> dict[str, Any]:
    batch: dict[str, Any] = collate([samples.sample(step, position) for position in positions])
    if samples.config.data.masks == "none":
        del batch["mask"]
    if not run.config.trains_captions and run.denoiser.replacement_loss is None:
        batch |= run.captions.encode_batch(batch["captions"])
    return to_device(run.denoiser, batch)
