"""Batches of one process for each optimizer step."""

import time
from collections.abc import Iterator
from typing import Any

from lora_diffusion.training.inputs.samples import TrainingSamples, collate
from lora_diffusion.training.setup import TrainingContext
from lora_diffusion.training.validation import to_device


class Batches:
    """Source of a run's training batches.

    Attributes:
        seconds: Total time spent on making batches so far.
    """

    def __init__(self, run: TrainingContext) -> None:
        self.run = run
        self.seconds = 0.0

    def batches_of_step(self, step: int) -> Iterator[tuple[dict[str, Any], float]]:
        """Yield the batches of this process for an optimizer step, each with the weight of its loss.

        Training images come first, then class images if there are any (`prior.mode = "pictures"`). The weights include
        the number of these two groups, because Accelerate divides the loss by the number of batches of both.
        """
        run, config = self.run, self.run.config
        size, count = config.batch_size, config.gradient_accumulation
        for samples, weight in zip(run.samples, (1.0, config.prior.weight), strict=False):
            for window in range(count):
                first = (window * run.accelerator.num_processes + run.accelerator.process_index) * size
                started = time.perf_counter()
                batch = self._make_batch(samples, step, range(first, first + size))
                self.seconds += time.perf_counter() - started
                yield batch, weight * len(run.samples)

    def _make_batch(self, samples: TrainingSamples, step: int, positions: range) -> dict[str, Any]:
        batch: dict[str, Any] = collate([samples.sample(step, position) for position in positions])
        if samples.config.data.masks == "none":
            del batch["mask"]
        if not self.run.config.trains_captions and self.run.denoiser.replacement_loss is None:
            batch |= self.run.captions.encode_batch(batch["captions"])
        return to_device(self.run.denoiser, batch)
