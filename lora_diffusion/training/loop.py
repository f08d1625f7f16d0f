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
from lora_diffusion.training.checkpoint import RunState, forget_states, identity, load_state, save_state
from lora_diffusion.training.checks import check_finite, check_gradients, check_saved, memory_refusals
from lora_diffusion.training.inputs.batches import Batches
from lora_diffusion.training.log import RunLog
from lora_diffusion.training.metadata import metadata_of, recent
from lora_diffusion.training.methods.injection import extract, layer_factors
from lora_diffusion.training.optim.ema import MovingAverage, applied, write
from lora_diffusion.training.optim.lr_schedule import rate_fraction
from lora_diffusion.training.optim.max_norm import limit_norms
from lora_diffusion.training.optim.optimizers import evaluation_mode, new_optimizer
from lora_diffusion.training.previews import make_samples
from lora_diffusion.training.seeding import sample_seed
from lora_diffusion.training.setup import Run, set_up
from lora_diffusion.training.signals import StopRequest, stop_requests
from lora_diffusion.training.validation import Best, HeldOut, validated


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
    best: Best | None = None
    """Of the validations, if there were any."""
    is_main_process: bool = True
    """Whether this is the process that wrote the file and should report."""


Watch = Callable[[Run, int], None]
"""Called before the first step and after those with samples, with the number of steps done."""


def train(config: TrainConfig, watch: Watch = lambda *_: None) -> TrainResult:
    """Train an adapter as `config` says and write it to `config.output`.

    Everything that can be wrong with the input is checked before the first step. A run that was stopped or killed goes
    on from its last state; on the CPU it gives the adapter of an uninterrupted run, bit for bit. Raises
    LoRADiffusionError's children.
    """
    with memory_refusals():
        run = set_up(config)
        progress = Progress(run, watch)
        with stop_requests() as request:
            stopped = progress.go_on(request)
        return finished(run, progress, stopped=stopped)


class Progress:
    """A run under way: the optimizer and everything else that changes from step to step."""

    def __init__(self, run: Run, watch: Watch) -> None:
        self.run, self.watch, config = run, watch, run.config
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
        self.best = Best()
        self.best_parameters: dict[str, Tensor] | None = None
        self.log = RunLog(run.folder, active=run.accelerator.is_main_process)
        self.identity = identity(config, base_hash=run.base.hash, data_hash=run.data_hash)
        self.resume()
        if config.tracking.trackers:
            run.accelerator.init_trackers(config.tracking.project)

    @property
    def step(self) -> int:
        return len(self.losses)

    def resume(self) -> None:
        """Go on from the last state of this run, if there is one and that is wanted."""
        run = self.run
        if not run.config.resume and run.accelerator.is_main_process:
            forget_states(run.folder)
        run.accelerator.wait_for_everyone()
        state = load_state(run.folder, self.identity)
        self.log.begin(state.step if state else 0)
        if state is None:
            return
        write(run.parameters, state.parameters)
        self.optimizer.load_state_dict(state.optimizer)
        if run.accelerator.scaler is not None and state.scaler is not None:
            run.accelerator.scaler.load_state_dict(dict(state.scaler))
        run.rules.load_state_dict(state.rules)
        if state.average:
            self.average = MovingAverage(**state.average)
        self.losses = list(state.losses)
        self.best = Best(**state.best)
        self.best_parameters = dict(state.best_parameters) if state.best_parameters else None
        self.log.add(self.step, {"event": "resumed"})

    def state(self) -> RunState:
        scaler = self.run.accelerator.scaler
        return RunState(
            step=self.step,
            losses=self.losses,
            parameters={name: p.detach().cpu() for name, p in self.run.parameters.items()},
            optimizer=self.optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler else None,
            average=self.average.state_dict() if self.average else None,
            rules=self.run.rules.state_dict(),
            best=asdict(self.best),
            best_parameters=self.best_parameters,
        )

    def go_on(self, request: StopRequest) -> bool:
        """All steps that are left; returns whether somebody stopped the run. Raises TrainingError."""
        run, config = self.run, self.run.config
        main = run.accelerator.is_main_process
        if self.step == 0:
            self.samples()
        with tqdm(total=config.steps, initial=self.step, desc="train", unit="step", disable=not main) as bar:
            while self.step < config.steps:
                started, loaded = time.perf_counter(), self.batches.seconds
                facts = self.one_step()
                taken = {"seconds": time.perf_counter() - started, "data_seconds": self.batches.seconds - loaded}
                self.tell({**facts, **{name: round(value, 4) for name, value in taken.items()}})
                bar.update()
                bar.set_postfix(loss=f"{recent(self.losses):.4f}")
                if self.step % config.samples.every == 0 or self.step == config.steps:
                    self.samples()
                if self.enough():
                    break
                if main and is_due(self.step, config.save_every, config):
                    self.save_intermediate()
                stop = request.agreed(run.accelerator)
                if stop or is_due(self.step, config.state_every, config):
                    self.save_state()
                if stop and self.step < config.steps:
                    self.log.add(self.step, {"event": "stopped"})
                    return True
        return False

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Into the log, and numbers to the trackers as well."""
        self.log.add(self.step, facts)
        flat = {**facts, **{f"validation/{key}": value for key, value in facts.get("validation", {}).items()}}
        numbers = {key: value for key, value in flat.items() if isinstance(value, float)}
        self.run.accelerator.log(numbers, step=self.step)

    def one_step(self) -> dict[str, Any]:
        """One optimizer step over all its batches."""
        run, config, step = self.run, self.run.config, self.step
        if not self.denoiser.training:  # or else every module of the base is visited at every step
            self.denoiser.train()
        # Dropout draws from the global generator; a seed for each step and process makes it a function of the step.
        torch.manual_seed(sample_seed(config.seed + run.accelerator.process_index, -(2**40) - step))
        fraction = rate_fraction(step, config.optimizer, config.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * fraction
        run.rules.before_step(step)
        window: list[Tensor] = []
        norm: Any = 0.0
        for batch, weight in self.batches.of(step):
            with run.accelerator.accumulate(self.denoiser):
                loss = weight * self.denoiser(**batch).mean()
                check_finite(loss, step + 1)
                penalty = run.rules.penalty()
                run.accelerator.backward(loss if penalty is None else loss + penalty)
                window.append(loss.detach())
                if run.accelerator.sync_gradients:
                    if step == 0:
                        check_gradients(self.trained)
                    for resting in run.rules.resting(step):
                        resting.grad = None
                    norm = run.accelerator.clip_grad_norm_(self.trained.values(), config.optimizer.max_gradient_norm)
                    if math.isfinite(norm):  # else a scaled loss was too large, and the optimizer skips the step
                        run.rules.after_gradients(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
        run.rules.after_step(step, self.rate_of)
        if config.adapter.max_norm:
            limit_norms(layer_factors(run.base, run.paths), config.adapter.max_norm)
        if self.average and run.rules.settled(step + 1):
            self.average = self.average.updated(run.parameters)
        losses: Any = run.accelerator.gather(torch.stack(window).mean()[None])
        self.losses.append(float(losses.mean()))
        facts = {"loss": self.losses[-1], "gradient_norm": float(norm), "rate": self.peaks[0] * fraction}
        return facts | self.validation()

    def rate_of(self, parameter: nn.Parameter) -> float:
        """The rate of a parameter in this step; some optimizers multiply it with one that they find. 0 if frozen."""
        if parameter not in self.groups:
            return 0.0
        group = self.optimizer.param_groups[self.groups[parameter]]
        return float(group["lr"]) * float(group.get("d", 1.0))

    def validation(self) -> dict[str, Any]:
        """What validation says after this step, if it is due."""
        run, config = self.run, self.run.config
        if run.held_out is None or not (self.step % config.validation.every == 0 or self.step == config.steps):
            return {}
        with self.resting():
            found = validated(run.denoiser, run.captions, run.held_out, config)
            by_rank = self.losses_by_rank(run.held_out) if self.step == config.steps else {}
            if run.rules.settled(self.step):
                self.best = self.best.after(self.step, found.loss)
            if self.best.step == self.step and config.validation.keep_best:
                self.best_parameters = {name: p.detach().clone() for name, p in run.parameters.items()}
        return {"validation": asdict(found), "best": self.best.step == self.step, **by_rank}

    def losses_by_rank(self, held_out: HeldOut) -> dict[str, Any]:
        """What each rank comes to that the file can be cut to, for a method that trains several."""
        run, losses = self.run, dict[str, float]()
        for rank, cut in run.rules.cuts().items():
            with cut:
                losses[str(rank)] = validated(run.denoiser, run.captions, held_out, run.config).loss
        return {"loss_by_rank": losses} if losses else {}

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The parameters as they would be saved: the moving average's, and without dropout."""
        self.run.denoiser.eval()
        try:
            with (
                evaluation_mode(self.optimizer),
                applied(self.run.parameters, self.average) if self.average else nullcontext(),
            ):
                yield
        finally:
            self.run.denoiser.train()

    def samples(self) -> None:
        """Pictures of what is learned so far."""
        if self.run.accelerator.is_main_process or self.run.config.compute.shard:
            with self.resting():
                make_samples(self.run, self.step)
        self.watch(self.run, self.step)

    def enough(self) -> bool:
        """Whether validation has not got better for long enough."""
        patience = self.run.config.validation.patience
        return patience > 0 and self.best.since >= patience

    def save_intermediate(self) -> None:
        output = self.run.config.output
        with self.resting():
            save_adapter(self.adapter(), output.with_name(f"{output.stem}-step{self.step:08d}.safetensors"))

    def save_state(self) -> None:
        if self.run.accelerator.is_main_process:
            save_state(self.run.folder, self.state(), self.identity)
        self.run.accelerator.wait_for_everyone()

    def adapter(self) -> Adapter:
        """What has been learned so far, with the record of how."""
        run = self.run
        metadata = metadata_of(run, self.losses, self.best)
        dtype = torch_dtype(run.config.save_precision)
        adapter = extract(run.base, run.paths, metadata, dtype)
        return replace(adapter, tokens=run.words.tokens(dtype)) if run.words else adapter


def finished(run: Run, progress: Progress, *, stopped: bool) -> TrainResult:
    """Write the adapter of a run that came to its end, and read it again."""
    losses, config = progress.losses, run.config
    best = progress.best if progress.best.step else None
    with progress.resting():
        if progress.best_parameters:
            write(run.parameters, progress.best_parameters)
        adapter = progress.adapter()
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
