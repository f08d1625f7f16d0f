"""The one training loop."""

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
    """The adapter, where it lies, and how training went."""

    adapter: Adapter
    path: Path
    steps: int
    """Optimizer steps that were taken."""
    stopped: bool
    """Whether somebody stopped the run; then nothing is at `path` yet, and the same settings go on from here."""
    first_loss: float
    """Mean loss over the first tenth of the steps."""
    last_loss: float
    """Mean loss over the last tenth."""
    best: EarlyStopping | None = None
    """Of the validations, if there were any."""
    is_main_process: bool = True
    """Whether this is the process that wrote the file and should report."""


Watch = Callable[[TrainingContext, int], None]
"""Called before the first step and after those with samples, with the number of steps done."""


def train(config: TrainConfig, watch: Watch = lambda *_: None) -> TrainResult:
    """Train an adapter as `config` says and write it to `config.output`.

    Everything that can be wrong with the input is checked before the first step. A run that was stopped or killed goes
    on from its last state; on the CPU it gives the adapter of an uninterrupted run, bit for bit. Raises
    LoRADiffusionError's children.
    """
    with explained_memory_errors():
        run = set_up(config)
        progress = Trainer(run, watch)
        with stop_requests() as request:
            stopped = progress.run(request)
        return finalize(run, progress, stopped=stopped)


class Trainer:
    """A run under way: the optimizer and everything else that changes from step to step."""

    def __init__(self, run: TrainingContext, watch: Watch) -> None:
        self.context, self.watch, config = run, watch, run.config
        text_encoders = tuple(name for name in run.base.family.components if name != "unet")
        optimizer = new_optimizer(run.parameters, config.optimizer, text_encoders)
        self.trained = {name: p for name, p in run.parameters.items() if p.requires_grad}
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.groups = {p: place for place, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.denoiser, self.optimizer = run.accelerator.prepare(run.denoiser, optimizer)
        decay = config.optimizer.ema_decay
        self.average = MovingAverage(decay=decay) if decay else None
        self.batches = Batches(run)
        self.losses: list[float] = []
        self.best = EarlyStopping()
        self.best_parameters: dict[str, Tensor] | None = None
        self.run_log = RunLog(run.folder, active=run.accelerator.is_main_process)
        self.identity = run_identity(config, base_hash=run.base.hash, data_hash=run.data_hash)
        self.resume()
        if config.tracking.trackers:
            run.accelerator.init_trackers(config.tracking.project)

    @property
    def step(self) -> int:
        return len(self.losses)

    def resume(self) -> None:
        """Go on from the last state of this run, if there is one and that is wanted."""
        run = self.context
        if not run.config.resume and run.accelerator.is_main_process:
            forget_states(run.folder)
        run.accelerator.wait_for_everyone()
        state = load_state(run.folder, self.identity)
        self.run_log.begin(state.step if state else 0)
        if state is None:
            return
        copy_values(run.parameters, state.parameters)
        self.optimizer.load_state_dict(state.optimizer)
        if run.accelerator.scaler is not None and state.scaler is not None:
            run.accelerator.scaler.load_state_dict(dict(state.scaler))
        run.rules.load_state_dict(state.rules)
        if state.average:
            self.average = MovingAverage(**state.average)
        self.losses = list(state.losses)
        self.best = EarlyStopping(**state.best)
        self.best_parameters = dict(state.best_parameters) if state.best_parameters else None
        self.run_log.add(self.step, {"event": "resumed"})

    def make_state(self) -> TrainingState:
        scaler = self.context.accelerator.scaler
        return TrainingState(
            step=self.step,
            losses=self.losses,
            parameters={name: p.detach().cpu() for name, p in self.context.parameters.items()},
            optimizer=self.optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler else None,
            average=self.average.state_dict() if self.average else None,
            rules=self.context.rules.state_dict(),
            best=asdict(self.best),
            best_parameters=self.best_parameters,
        )

    def run(self, request: StopRequest) -> bool:
        """All steps that are left; returns whether somebody stopped the run. Raises TrainingError."""
        run, config = self.context, self.context.config
        main = run.accelerator.is_main_process
        if self.step == 0:
            self.draw_samples()
        with tqdm(total=config.steps, initial=self.step, desc="train", unit="step", disable=not main) as bar:
            while self.step < config.steps:
                started, loaded = time.perf_counter(), self.batches.seconds
                facts = self.train_step()
                taken = {"seconds": time.perf_counter() - started, "data_seconds": self.batches.seconds - loaded}
                self.log({**facts, **{name: round(value, 4) for name, value in taken.items()}})
                bar.update()
                bar.set_postfix(loss=f"{recent_loss(self.losses):.4f}")
                if self.step % config.samples.every == 0 or self.step == config.steps:
                    self.draw_samples()
                if self.should_stop():
                    break
                if main and is_due(self.step, config.save_every, config):
                    self.save_intermediate()
                stop = request.synced_stop(run.accelerator)
                if stop or is_due(self.step, config.state_every, config):
                    self.save_state()
                if stop and self.step < config.steps:
                    self.run_log.add(self.step, {"event": "stopped"})
                    return True
        return False

    def log(self, facts: Mapping[str, Any]) -> None:
        """Into the log, and numbers to the trackers as well."""
        self.run_log.add(self.step, facts)
        flat = {**facts, **{f"validation/{key}": value for key, value in facts.get("validation", {}).items()}}
        numbers = {key: value for key, value in flat.items() if isinstance(value, float)}
        self.context.accelerator.log(numbers, step=self.step)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over all its batches."""
        run, config, step = self.context, self.context.config, self.step
        if not self.denoiser.training:  # or else every module of the base is visited at every step
            self.denoiser.train()
        # Dropout draws from the global generator; a seed for each step and process makes it a function of the step.
        torch.manual_seed(sample_seed(config.seed + run.accelerator.process_index, -(2**40) - step))
        fraction = lr_fraction(step, config.optimizer, config.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * fraction
        run.rules.before_step(step)
        window: list[Tensor] = []
        norm: Any = 0.0
        for batch, weight in self.batches.batches_of_step(step):
            with run.accelerator.accumulate(self.denoiser):
                loss = weight * self.denoiser(**batch).mean()
                check_finite(loss, step + 1)
                penalty = run.rules.penalty()
                run.accelerator.backward(loss if penalty is None else loss + penalty)
                window.append(loss.detach())
                if run.accelerator.sync_gradients:
                    if step == 0:
                        check_gradients(self.trained)
                    for resting in run.rules.frozen_parameters(step):
                        resting.grad = None
                    norm = run.accelerator.clip_grad_norm_(self.trained.values(), config.optimizer.max_gradient_norm)
                    if math.isfinite(norm):  # else a scaled loss was too large, and the optimizer skips the step
                        run.rules.after_gradients(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
        run.rules.after_step(step, self.get_learning_rate)
        if config.adapter.max_norm:
            limit_norms(list_factors(run.base, run.paths), config.adapter.max_norm)
        if self.average and run.rules.is_stable(step + 1):
            self.average = self.average.update(run.parameters)
        losses: Any = run.accelerator.gather(torch.stack(window).mean()[None])
        self.losses.append(float(losses.mean()))
        facts = {"loss": self.losses[-1], "gradient_norm": float(norm), "rate": self.peaks[0] * fraction}
        return facts | self.validate_if_due()

    def get_learning_rate(self, parameter: nn.Parameter) -> float:
        """The rate of a parameter in this step; some optimizers multiply it with one that they find. 0 if frozen."""
        if parameter not in self.groups:
            return 0.0
        group = self.optimizer.param_groups[self.groups[parameter]]
        return float(group["lr"]) * float(group.get("d", 1.0))

    def validate_if_due(self) -> dict[str, Any]:
        """What validation says after this step, if it is due."""
        run, config = self.context, self.context.config
        if run.held_out is None or not (self.step % config.validation.every == 0 or self.step == config.steps):
            return {}
        with self.eval_state():
            found = validate(run.denoiser, run.captions, run.held_out, config)
            by_rank = self.validate_ranks(run.held_out) if self.step == config.steps else {}
            if run.rules.is_stable(self.step):
                self.best = self.best.updated_with(self.step, found.loss)
            if self.best.step == self.step and config.validation.keep_best:
                self.best_parameters = {name: p.detach().clone() for name, p in run.parameters.items()}
        return {"validation": asdict(found), "best": self.best.step == self.step, **by_rank}

    def validate_ranks(self, held_out: HeldOut) -> dict[str, Any]:
        """What each rank comes to that the file can be cut to, for a method that trains several."""
        run, losses = self.context, dict[str, float]()
        for rank, cut in run.rules.truncations().items():
            with cut:
                losses[str(rank)] = validate(run.denoiser, run.captions, held_out, run.config).loss
        return {"loss_by_rank": losses} if losses else {}

    @contextmanager
    def eval_state(self) -> Iterator[None]:
        """The parameters as they would be saved: the moving average's, and without dropout."""
        self.context.denoiser.eval()
        try:
            with (
                evaluation_mode(self.optimizer),
                swapped_parameters(self.context.parameters, self.average) if self.average else nullcontext(),
            ):
                yield
        finally:
            self.context.denoiser.train()

    def draw_samples(self) -> None:
        """Pictures of what is learned so far."""
        if self.context.accelerator.is_main_process or self.context.config.compute.shard:
            with self.eval_state():
                draw_previews(self.context, self.step)
        self.watch(self.context, self.step)

    def should_stop(self) -> bool:
        """Whether validation has not got better for long enough."""
        patience = self.context.config.validation.patience
        return patience > 0 and self.best.since >= patience

    def save_intermediate(self) -> None:
        output = self.context.config.output
        with self.eval_state():
            save_adapter(self.extract_adapter(), output.with_name(f"{output.stem}-step{self.step:08d}.safetensors"))

    def save_state(self) -> None:
        if self.context.accelerator.is_main_process:
            save_state(self.context.folder, self.make_state(), self.identity)
        self.context.accelerator.wait_for_everyone()

    def extract_adapter(self) -> Adapter:
        """What has been learned so far, with the record of how."""
        run = self.context
        metadata = make_metadata(run, self.losses, self.best)
        dtype = torch_dtype(run.config.save_precision)
        adapter = extract_adapter(run.base, run.paths, metadata, dtype)
        return replace(adapter, tokens=run.words.extract_tokens(dtype)) if run.words else adapter


def finalize(run: TrainingContext, progress: Trainer, *, stopped: bool) -> TrainResult:
    """Write the adapter of a run that came to its end, and read it again."""
    losses, config = progress.losses, run.config
    best = progress.best if progress.best.step else None
    with progress.eval_state():
        if progress.best_parameters:
            copy_values(run.parameters, progress.best_parameters)
        adapter = progress.extract_adapter()
    if run.accelerator.is_main_process and not stopped:
        save_adapter(adapter, config.output)
        check_saved(adapter, config.output, run.base)
        forget_states(run.folder)
    run.accelerator.end_training()
    tenth = max(1, len(losses) // 10)
    return TrainResult(
        adapter=adapter,
        path=config.output,
        steps=len(losses),
        stopped=stopped,
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        best=best,
        is_main_process=run.accelerator.is_main_process,
    )


def is_due(step: int, every: int, config: TrainConfig) -> bool:
    """Whether something is to be written after a step; at the end other things are."""
    return every > 0 and step % every == 0 and step < config.steps
