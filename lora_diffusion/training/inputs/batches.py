"""What a process trains on in a step."""

import time
from collections.abc import Iterator
from typing import Any

from lora_diffusion.training.inputs.samples import TrainingSamples, collate
from lora_diffusion.training.setup import TrainingContext
from lora_diffusion.training.validation import to_device


class Batches:
    """The batches of a run, and how long they were waited for."""

    def __init__(self, run: TrainingContext) -> None:
        self.run = run
        self.seconds = 0.0

    def batches_of_step(self, step: int) -> Iterator[tuple[dict[str, Any], float]]:
        """The batches of this process, with what each weighs: pictures, then class pictures if there are any."""
        run, config = self.run, self.run.config
        size, count = config.batch_size, config.gradient_accumulation
        for samples, weight in zip(run.samples, (1.0, config.prior.weight), strict=False):
            for window in range(count):
                first = (window * run.accelerator.num_processes + run.accelerator.process_index) * size
                started = time.perf_counter()
                batch = self.make_batch(samples, step, range(first, first + size))
                self.seconds += time.perf_counter() - started
                yield batch, weight * len(run.samples)

    def make_batch(self, samples: TrainingSamples, step: int, places: range) -> dict[str, Any]:
        batch: dict[str, Any] = collate([samples.sample(step, place) for place in places])
        if samples.config.data.masks == "none":
            del batch["mask"]
        if not self.run.config.trains_captions and self.run.denoiser.replacement_loss is None:
            batch |= self.run.captions.encode_batch(batch["captions"])
        return to_device(self.run.denoiser, batch)
