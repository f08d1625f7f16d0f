"""The training loop, which adapter training, distillation and the training of gates share.

A task brings a model whose forward pass returns one loss per sample, the parameters to train, and the batches of each
step. The loop does everything else: optimizer, learning rates, accumulation, clipping, checks, moving average, log and
stop signals.
"""

# Accelerate is untyped.
# pyright: standard

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from lora_diffusion.config.optimizer import OptimizerConfig
from lora_diffusion.core.seeding import derive_seed
from lora_diffusion.training.checks import check_finite
from lora_diffusion.training.log import RunLog
from lora_diffusion.training.methods.callbacks import MethodCallbacks
from lora_diffusion.training.optim.ema import MovingAverage
from lora_diffusion.training.optim.lr_schedule import lr_fraction
from lora_diffusion.training.optim.optimizers import new_optimizer
from lora_diffusion.training.signals import StopRequest, stop_requests

Batch = Mapping[str, Any]
"""Keyword arguments of a model's forward pass."""

_RECENT_STEPS = 20
"""Number of steps over which the displayed and recorded loss is averaged."""


def new_accelerator(**options: Any) -> Accelerator:
    """Make an Accelerator with these options, independent of earlier ones in the same process."""
    # Accelerate shares one state per process and refuses another precision in the same process. Its constructors cannot
    # replace the state, and there is no public API to discard it; tests/training/test_private_apis.py watches this one.
    AcceleratorState._reset_state()
    return Accelerator(**options)


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What the loop trains: a model with its loss, the trainable parameters, and the batches of each step."""

    name: str
    """Label of the progress bar."""
    model: nn.Module = field(repr=False)
    """Module, on its device, whose forward pass takes a batch and returns the loss of each sample, (n,)."""
    parameters: Mapping[str, nn.Parameter] = field(repr=False)
    """Parameters to train by name, which starts with the component, such as `unet.`; see `resolve_peak_rates`."""
    batches: Callable[[int], Iterable[tuple[Batch, float]]]
    """Returns the batches of this process for an optimizer step, each with the weight of its loss."""
    steps: int
    """Number of optimizer steps."""
    optimizer: OptimizerConfig
    """Optimizer, learning rates and their schedule."""
    text_encoders: Sequence[str] = ()
    """All text encoders of the base, in order; they may have their own learning rates."""
    callbacks: MethodCallbacks = field(default_factory=MethodCallbacks)
    """Hooks between the phases of a step."""
    accelerator: Accelerator = field(
        default_factory=lambda: new_accelerator(mixed_precision="no", device_placement=False)
    )
    """Accelerate's interface to devices and processes; by default it leaves the model on its device."""
    seed: int | None = None
    """Seed of the global random generator at each step, for dropout; None if the model draws no random numbers."""
    folder: Path | None = None
    """Folder of the log; None for no log."""


class Trainer:
    """The part of a run that changes from step to step: optimizer, losses and moving average.

    Subclasses override the hooks `start`, `after_backward`, `after_update`, `evaluate`, `after_step` and `save_state`.

    Args:
        task: What to train.
    """

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        optimizer = new_optimizer(task.parameters, task.optimizer, task.text_encoders)
        self.trainable_parameters = {name: p for name, p in task.parameters.items() if p.requires_grad}
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.group_index = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.model, self.optimizer = task.accelerator.prepare(task.model, optimizer)
        decay = task.optimizer.ema_decay
        self.ema = MovingAverage(decay=decay) if decay else None
        self.losses: list[float] = []
        self.data_seconds = 0.0
        main = task.folder is not None and task.accelerator.is_main_process
        self.run_log = RunLog(task.folder or Path(), active=main)

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return len(self.losses)

    def run(self, request: StopRequest) -> bool:
        """Do the remaining steps; return whether a signal stopped the run.

        Raises:
            TrainingError: If the loss is not finite.
        """
        task = self.task
        if self.step == 0:
            self.start()
        hidden = not task.accelerator.is_main_process
        with tqdm(total=task.steps, initial=self.step, desc=task.name, unit="step", disable=hidden) as bar:
            while self.step < task.steps:
                started, data_seconds = time.perf_counter(), self.data_seconds
                values = self.train_step() | self.evaluate()
                times = {"seconds": time.perf_counter() - started, "data_seconds": self.data_seconds - data_seconds}
                self.log({**values, **{name: round(value, 4) for name, value in times.items()}})
                bar.update()
                bar.set_postfix(loss=f"{recent_loss(self.losses):.4f}")
                if self.after_step():
                    break
                stop = request.sync_stop(task.accelerator)
                self.save_state(stop=stop)
                if stop and self.step < task.steps:
                    self.run_log.add(self.step, {"event": "stopped"})
                    return True
        return False

    def train_step(self) -> dict[str, Any]:
        """Do one optimizer step over all of its batches; return the values to log."""
        task, step, accelerator, callbacks = self.task, self.step, self.task.accelerator, self.task.callbacks
        if not self.model.training:  # train() visits every module of the base, so do not call it at every step
            self.model.train()
        if task.seed is not None:  # seeded per step and process, so that resumed runs are reproducible
            torch.manual_seed(derive_seed(task.seed + accelerator.process_index, -(2**40) - step))
        fraction = lr_fraction(step, task.optimizer, task.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * fraction
        callbacks.before_step(step)
        batch_losses: list[Tensor] = []
        norm = 0.0
        for batch, weight in self._measure_data_time(task.batches(step)):
            with accelerator.accumulate(self.model):
                loss = weight * self.model(**batch).mean()
                check_finite(loss, step + 1)
                penalty = callbacks.penalty()
                accelerator.backward(loss if penalty is None else loss + penalty)
                batch_losses.append(loss.detach())
                if accelerator.sync_gradients:
                    norm = self._process_gradients(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
        callbacks.after_step(step, self.get_learning_rate)
        self.after_update()
        if self.ema and callbacks.is_stable(step + 1):
            self.ema = self.ema.update(task.parameters)
        losses: Any = accelerator.gather(torch.stack(batch_losses).mean()[None])
        self.losses.append(float(losses.mean()))
        return {"loss": self.losses[-1], "gradient_norm": float(norm), "rate": self.peak_lrs[0] * fraction}

    def _process_gradients(self, step: int) -> float:
        """Check, drop and clip the gradients of a step; return their norm before clipping."""
        task = self.task
        self.after_backward()
        for parameter in task.callbacks.frozen_parameters(step):
            parameter.grad = None
        norm: Any = task.accelerator.clip_grad_norm_(
            self.trainable_parameters.values(), task.optimizer.max_gradient_norm
        )
        if math.isfinite(norm):  # otherwise the scaled fp16 loss overflowed, and the step is skipped
            task.callbacks.after_gradients(step)
        return norm

    def _measure_data_time(self, batches: Iterable[tuple[Batch, float]]) -> Iterator[tuple[Batch, float]]:
        """Yield batches, and add the time spent on making them to `data_seconds`."""
        iterator, started = iter(batches), time.perf_counter()
        for batch in iterator:
            self.data_seconds += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def get_learning_rate(self, parameter: nn.Parameter) -> float:
        """Return the learning rate of a parameter in the current step; 0 if the optimizer does not train it.

        Prodigy and D-Adaptation estimate a factor `d`, which multiplies the scheduled learning rate.
        """
        if parameter not in self.group_index:
            return 0.0
        group = self.optimizer.param_groups[self.group_index[parameter]]
        return float(group["lr"]) * float(group.get("d", 1.0))

    def log(self, values: Mapping[str, Any]) -> None:
        """Write values to the log, and those that are floats to the trackers as well."""
        self.run_log.add(self.step, values)
        flat = {**values, **{f"validation/{key}": value for key, value in values.get("validation", {}).items()}}
        numbers = {key: value for key, value in flat.items() if isinstance(value, float)}
        self.task.accelerator.log(numbers, step=self.step)

    def start(self) -> None:
        """Prepare a run before its first step; not called for a resumed run."""

    def after_backward(self) -> None:
        """Read the gradients of all batches of a step, before some are dropped and all are clipped."""

    def after_update(self) -> None:
        """Change the parameters after the optimizer step, before they enter the moving average."""

    def evaluate(self) -> dict[str, Any]:
        """Measure the model after a step; return the values to log."""
        return {}

    def after_step(self) -> bool:
        """Act after a step was logged; return whether to end the run early."""
        return False

    def save_state(self, *, stop: bool) -> None:
        """Save the state of the run if it is due after this step, or if a signal stops the run (`stop`)."""


def run_to_end(task: TrainingTask) -> None:
    """Train a task that cannot be resumed. Ctrl-C and SIGTERM end it between two steps.

    Raises:
        TrainingError: If the loss is not finite.
        KeyboardInterrupt: If a signal stopped the run, unless the previous handler of the signal does something else.
    """
    with stop_requests() as request:
        stopped = Trainer(task).run(request)
    if stopped:
        if request.signal is not None:  # None if another process received it
            signal.raise_signal(request.signal)
        raise KeyboardInterrupt


def recent_loss(losses: Sequence[float]) -> float:
    """Return the mean loss of the last 20 steps."""
    return sum(losses[-_RECENT_STEPS:]) / len(losses[-_RECENT_STEPS:])
