"""The training loop: optimizer steps, validation, sample images, checkpoints and the saved adapter."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.training.checkpoint import TrainingState, forget_states, load_state, run_identity, save_state
from lora_diffusion.training.checks import check_finite, check_gradients, check_saved, explained_memory_errors
from lora_diffusion.training.inputs.batches import Batches
from lora_diffusion.training.log import RunLog
from lora_diffusion.training.metadata import make_metadata, recent_loss
from lora_diffusion.training.methods.injection import extract_adapter, list_factors
from lora_diffusion.training.optim.ema import MovingAverage, copy_values, swapped_parameters
from lora_diffusion.training.optim.lr_schedule import lr_fraction
from lora_diffusion.training.optim.max_norm import limit_norms
from lora_diffusion.training.optim.optimizers import evaluation_mode, new_optimizer
from lora_diffusion.training.previews import draw_previews
from lora_diffusion.training.seeding import sample_seed
from lora_diffusion.training.setup import TrainingContext, set_up
from lora_diffusion.training.signals import StopRequest, stop_requests
from lora_diffusion.training.validation import EarlyStopping, HeldOut, validate


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a training run."""

    adapter: Adapter
    """The trained adapter, as it was saved."""
    path: Path
    """File of the adapter."""
    steps: int
    """Number of optimizer steps done, including those before a resumption."""
    stopped: bool
    """Whether a signal stopped the run. Then `path` has not been written; train with the same settings to resume."""
    first_loss: float
    """Mean loss over the first tenth of the steps."""
    last_loss: float
    """Mean loss over the last tenth of the steps."""
    best: EarlyStopping | None = None
    """The best validation; None if there was no validation."""
    is_main_process: bool = True
    """Whether this process wrote the file and should report the result."""


Watch = Callable[[TrainingContext, int], None]
"""Callback that gets the run and the number of optimizer steps done. Called whenever sample images are due: before the
first step, every `samples.every` steps, and after the last step."""


def train(config: TrainConfig, watch: Watch = lambda *_: None) -> TrainResult:
    """Train an adapter and save it to `config.output`.

    Settings and data are checked before the first step. A run that was stopped or killed resumes from its last state;
    on the CPU the result is identical, bit for bit, to that of an uninterrupted run.

    Args:
        config: Settings of the run.
        watch: Callback for progress.

    Raises:
        ConfigError: If settings are invalid or contradict each other.
        DatasetError: If images or captions cannot be used.
        BaseModelError: If the base cannot be loaded.
        TrainingError: If the loss is not finite, nothing would be learned, or memory runs out.
        OutputError: If a file cannot be written.
    """
    with explained_memory_errors():
        context = set_up(config)
        trainer = Trainer(context, watch)
        with stop_requests() as request:
            stopped = trainer.run(request)
        return _finalize(context, trainer, stopped=stopped)


class Trainer:
    """The part of a run that changes from step to step: optimizer, losses, EMA and best validation.

    A new trainer resumes from the last state of the run, if `config.resume` is set and there is a state.

    Args:
        context: The run, as `set_up` returns it.
        watch: Callback for progress.
    """

    def __init__(self, context: TrainingContext, watch: Watch) -> None:
        self.context, self.watch, config = context, watch, context.config
        text_encoders = tuple(name for name in context.base.family.components if name != "unet")
        optimizer = new_optimizer(context.parameters, config.optimizer, text_encoders)
        self.trainable_parameters = {name: p for name, p in context.parameters.items() if p.requires_grad}
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.group_index = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.denoiser, self.optimizer = context.accelerator.prepare(context.denoiser, optimizer)
        decay = config.optimizer.ema_decay
        self.ema = MovingAverage(decay=decay) if decay else None
        self.batches = Batches(context)
        self.losses: list[float] = []
        self.best = EarlyStopping()
        self.best_parameters: dict[str, Tensor] | None = None
        self.run_log = RunLog(context.folder, active=context.accelerator.is_main_process)
        self.identity = run_identity(config, base_hash=context.base.hash, data_hash=context.data_hash)
        self.resume()
        if config.tracking.trackers:
            context.accelerator.init_trackers(config.tracking.project)

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return len(self.losses)

    def resume(self) -> None:
        """Load the last state of this run, if there is one. Without `config.resume`, remove old states instead.

        Raises:
            ConfigError: If the last state belongs to a run with other settings.
        """
        context = self.context
        if not context.config.resume and context.accelerator.is_main_process:
            forget_states(context.folder)
        context.accelerator.wait_for_everyone()
        state = load_state(context.folder, self.identity)
        self.run_log.begin(state.step if state else 0)
        if state is None:
            return
        copy_values(context.parameters, state.parameters)
        self.optimizer.load_state_dict(state.optimizer)
        if context.accelerator.scaler is not None and state.scaler is not None:
            context.accelerator.scaler.load_state_dict(dict(state.scaler))
        context.callbacks.load_state_dict(state.rules)
        if state.average:
            self.ema = MovingAverage(**state.average)
        self.losses = list(state.losses)
        self.best = EarlyStopping(**state.best)
        self.best_parameters = dict(state.best_parameters) if state.best_parameters else None
        self.run_log.add(self.step, {"event": "resumed"})

    def make_state(self) -> TrainingState:
        """Collect the current state of the run."""
        scaler = self.context.accelerator.scaler
        return TrainingState(
            step=self.step,
            losses=self.losses,
            parameters={name: p.detach().cpu() for name, p in self.context.parameters.items()},
            optimizer=self.optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler else None,
            average=self.ema.state_dict() if self.ema else None,
            rules=self.context.callbacks.state_dict(),
            best=asdict(self.best),
            best_parameters=self.best_parameters,
        )

    def run(self, request: StopRequest) -> bool:
        """Do the remaining steps; return whether a signal stopped the run.

        Raises:
            TrainingError: If the loss is not finite or no gradient reaches a component.
        """
        context, config = self.context, self.context.config
        main = context.accelerator.is_main_process
        if self.step == 0:
            self.draw_samples()
        with tqdm(total=config.steps, initial=self.step, desc="train", unit="step", disable=not main) as bar:
            while self.step < config.steps:
                started, data_started = time.perf_counter(), self.batches.seconds
                facts = self.train_step()
                times = {"seconds": time.perf_counter() - started, "data_seconds": self.batches.seconds - data_started}
                self.log({**facts, **{name: round(value, 4) for name, value in times.items()}})
                bar.update()
                bar.set_postfix(loss=f"{recent_loss(self.losses):.4f}")
                if self.step % config.samples.every == 0 or self.step == config.steps:
                    self.draw_samples()
                if self.should_stop():
                    break
                if main and _is_due(self.step, config.save_every, config):
                    self.save_intermediate()
                stop = request.synced_stop(context.accelerator)
                if stop or _is_due(self.step, config.state_every, config):
                    self.save_state()
                if stop and self.step < config.steps:
                    self.run_log.add(self.step, {"event": "stopped"})
                    return True
        return False

    def log(self, facts: Mapping[str, Any]) -> None:
        """Write values to the log, and those that are floats to the trackers as well."""
        self.run_log.add(self.step, facts)
        flat = {**facts, **{f"validation/{key}": value for key, value in facts.get("validation", {}).items()}}
        numbers = {key: value for key, value in flat.items() if isinstance(value, float)}
        self.context.accelerator.log(numbers, step=self.step)

    def train_step(self) -> dict[str, Any]:
        """Do one optimizer step over all of its batches; return the values to log."""
        context, config, step = self.context, self.context.config, self.step
        if not self.denoiser.training:  # train() visits every module of the base, so do not call it at every step
            self.denoiser.train()
        # Dropout uses the global generator. Seeding it per step and process makes resumed runs reproducible.
        torch.manual_seed(sample_seed(config.seed + context.accelerator.process_index, -(2**40) - step))
        fraction = lr_fraction(step, config.optimizer, config.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * fraction
        context.callbacks.before_step(step)
        batch_losses: list[Tensor] = []
        norm: Any = 0.0
        for batch, weight in self.batches.batches_of_step(step):
            with context.accelerator.accumulate(self.denoiser):
                loss = weight * self.denoiser(**batch).mean()
                check_finite(loss, step + 1)
                penalty = context.callbacks.penalty()
                context.accelerator.backward(loss if penalty is None else loss + penalty)
                batch_losses.append(loss.detach())
                if context.accelerator.sync_gradients:
                    if step == 0:
                        check_gradients(self.trainable_parameters)
                    for parameter in context.callbacks.frozen_parameters(step):
                        parameter.grad = None
                    norm = context.accelerator.clip_grad_norm_(
                        self.trainable_parameters.values(), config.optimizer.max_gradient_norm
                    )
                    if math.isfinite(norm):  # otherwise the scaled fp16 loss overflowed, and the step is skipped
                        context.callbacks.after_gradients(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
        context.callbacks.after_step(step, self.get_learning_rate)
        if config.adapter.max_delta_norm:
            limit_norms(list_factors(context.base, context.paths), config.adapter.max_delta_norm)
        if self.ema and context.callbacks.is_stable(step + 1):
            self.ema = self.ema.update(context.parameters)
        losses: Any = context.accelerator.gather(torch.stack(batch_losses).mean()[None])
        self.losses.append(float(losses.mean()))
        facts = {"loss": self.losses[-1], "gradient_norm": float(norm), "rate": self.peak_lrs[0] * fraction}
        return facts | self.validate_if_due()

    def get_learning_rate(self, parameter: nn.Parameter) -> float:
        """Return the learning rate of a parameter in the current step; 0 if the optimizer does not train it.

        Prodigy and D-Adaptation estimate a factor `d`, which multiplies the scheduled learning rate.
        """
        if parameter not in self.group_index:
            return 0.0
        group = self.optimizer.param_groups[self.group_index[parameter]]
        return float(group["lr"]) * float(group.get("d", 1.0))

    def validate_if_due(self) -> dict[str, Any]:
        """Run validation if it is due after this step; return the values to log, otherwise an empty dict."""
        context, config = self.context, self.context.config
        if context.held_out is None or not (self.step % config.validation.every == 0 or self.step == config.steps):
            return {}
        with self.eval_state():
            validation = validate(context.denoiser, context.captions, context.held_out, config)
            by_rank = self.validate_ranks(context.held_out) if self.step == config.steps else {}
            if context.callbacks.is_stable(self.step):
                self.best = self.best.updated_with(self.step, validation.loss)
            if self.best.step == self.step and config.validation.keep_best:
                self.best_parameters = {name: p.detach().clone() for name, p in context.parameters.items()}
        return {"validation": asdict(validation), "best": self.best.step == self.step, **by_rank}

    def validate_ranks(self, held_out: HeldOut) -> dict[str, Any]:
        """Validate the adapter truncated to each rank that its method (DyLoRA) trains; empty for other methods."""
        context, losses = self.context, dict[str, float]()
        for rank, truncation in context.callbacks.truncations().items():
            with truncation:
                losses[str(rank)] = validate(context.denoiser, context.captions, held_out, context.config).loss
        return {"loss_by_rank": losses} if losses else {}

    @contextmanager
    def eval_state(self) -> Iterator[None]:
        """Switch to the parameters that would be saved (those of the EMA, if there is one), and disable dropout."""
        self.context.denoiser.eval()
        try:
            with (
                evaluation_mode(self.optimizer),
                swapped_parameters(self.context.parameters, self.ema) if self.ema else nullcontext(),
            ):
                yield
        finally:
            self.context.denoiser.train()

    def draw_samples(self) -> None:
        """Generate sample images with the adapter in its current state, and call `watch`."""
        if self.context.accelerator.is_main_process or self.context.config.compute.shard:
            with self.eval_state():
                draw_previews(self.context, self.step)
        self.watch(self.context, self.step)

    def should_stop(self) -> bool:
        """Return whether validation has not improved for `validation.patience` validations."""
        patience = self.context.config.validation.patience
        return patience > 0 and self.best.since >= patience

    def save_intermediate(self) -> None:
        """Save the adapter in its current state to `NAME-stepNNNNNNNN.safetensors`."""
        output = self.context.config.output
        with self.eval_state():
            save_adapter(self.extract_adapter(), output.with_name(f"{output.stem}-step{self.step:08d}.safetensors"))

    def save_state(self) -> None:
        """Save the state of the run, so that it can be resumed."""
        if self.context.accelerator.is_main_process:
            save_state(self.context.folder, self.make_state(), self.identity)
        self.context.accelerator.wait_for_everyone()

    def extract_adapter(self) -> Adapter:
        """Return the adapter in its current state, with metadata about the run."""
        context = self.context
        metadata = make_metadata(context, self.losses, self.best)
        dtype = torch_dtype(context.config.save_precision)
        adapter = extract_adapter(context.base, context.paths, metadata, dtype)
        learned_tokens = context.learned_tokens
        return replace(adapter, tokens=learned_tokens.extract_tokens(dtype)) if learned_tokens else adapter


def _finalize(context: TrainingContext, trainer: Trainer, *, stopped: bool) -> TrainResult:
    """Save the adapter, check the file and remove the states of the run, unless the run was stopped."""
    losses, config = trainer.losses, context.config
    best = trainer.best if trainer.best.step else None
    with trainer.eval_state():
        if trainer.best_parameters:
            copy_values(context.parameters, trainer.best_parameters)
        adapter = trainer.extract_adapter()
    if context.accelerator.is_main_process and not stopped:
        save_adapter(adapter, config.output)
        check_saved(adapter, config.output, context.base)
        forget_states(context.folder)
    context.accelerator.end_training()
    tenth = max(1, len(losses) // 10)
    return TrainResult(
        adapter=adapter,
        path=config.output,
        steps=len(losses),
        stopped=stopped,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        best=best,
        is_main_process=context.accelerator.is_main_process,
    )


def _is_due(step: int, every: int, config: TrainConfig) -> bool:
    """Return whether to save something every `every` steps (0 for never) after this step, unless it is the last."""
    return every > 0 and step % every == 0 and step < config.steps
