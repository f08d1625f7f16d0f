"""Train an adapter: resuming, validation, sample images, intermediate adapters and the saved file.

The steps themselves are those of `training/loop.py`.
"""

# Accelerate is untyped.
# pyright: standard

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.training.checkpoint import TrainingState, forget_states, load_state, run_identity, save_state
from lora_diffusion.training.checks import check_gradients, check_saved, explained_memory_errors
from lora_diffusion.training.inputs.batches import make_batches
from lora_diffusion.training.loop import Trainer, TrainingTask
from lora_diffusion.training.metadata import make_training_metadata
from lora_diffusion.training.methods.injection import extract_adapter, list_factors
from lora_diffusion.training.optim.ema import MovingAverage, copy_values, swapped_parameters
from lora_diffusion.training.optim.max_norm import limit_norms
from lora_diffusion.training.optim.optimizers import evaluation_mode
from lora_diffusion.training.previews import draw_previews
from lora_diffusion.training.setup import TrainingContext, set_up
from lora_diffusion.training.signals import stop_requests
from lora_diffusion.training.validation import EarlyStopping, HeldOut, run_validation


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


ProgressCallback = Callable[[TrainingContext, int], None]
"""Receives the run and the number of optimizer steps done. Called whenever sample images are due: before the
first step, every `samples.every` steps, and after the last step."""


def train(config: TrainConfig, on_progress: ProgressCallback = lambda *_: None) -> TrainResult:
    """Train an adapter and save it to `config.output`.

    Settings and data are checked before the first step. A run that was stopped or killed resumes from its last state;
    on the CPU the result is identical, bit for bit, to that of an uninterrupted run.

    Args:
        config: Settings of the run.
        on_progress: Callback for progress.

    Raises:
        ConfigError: If settings are invalid or contradict each other.
        DatasetError: If images or captions cannot be used.
        BaseModelError: If the base cannot be loaded.
        TrainingError: If the loss is not finite, nothing would be learned, or memory runs out.
        OutputError: If a file cannot be written.
    """
    with explained_memory_errors():
        context = set_up(config)
        trainer = AdapterTrainer(context, on_progress)
        with stop_requests() as request:
            stopped = trainer.run(request)
        return _finalize(context, trainer, stopped=stopped)


class AdapterTrainer(Trainer):
    """Training of an adapter: the loop with validation, sample images, states and intermediate adapters.

    A new trainer resumes from the last state of the run, if `config.resume` is set and there is a state.

    Args:
        context: The run, as `set_up` returns it.
        on_progress: Callback for progress.
    """

    def __init__(self, context: TrainingContext, on_progress: ProgressCallback) -> None:
        config = context.config
        super().__init__(
            TrainingTask(
                name="train",
                model=context.denoiser,
                parameters=context.parameters,
                batches=partial(make_batches, context),
                steps=config.steps,
                optimizer=config.optimizer,
                text_encoders=tuple(name for name in context.base.family.components if name != "unet"),
                callbacks=context.callbacks,
                accelerator=context.accelerator,
                seed=config.seed,
                folder=context.folder,
            )
        )
        self.context, self.on_progress = context, on_progress
        self.best = EarlyStopping()
        self.best_parameters: dict[str, Tensor] | None = None
        self.identity = run_identity(config, base_hash=context.base.hash, data_hash=context.data_hash)
        self.resume()
        if config.tracking.trackers:
            context.accelerator.init_trackers(config.tracking.project)

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
        context.callbacks.load_state_dict(state.callbacks)
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
            callbacks=self.context.callbacks.state_dict(),
            best=asdict(self.best),
            best_parameters=self.best_parameters,
        )

    def start(self) -> None:
        """Generate the first sample images."""
        self.draw_samples()

    def after_backward(self) -> None:
        """Check that every component has a gradient, in the first step."""
        if self.step == 0:
            check_gradients(self.trainable_parameters)

    def after_update(self) -> None:
        """Limit the norms of all deltas to `adapter.max_delta_norm`."""
        context, limit = self.context, self.context.config.adapter.max_delta_norm
        if limit:
            limit_norms(list_factors(context.base, context.paths), limit)

    def evaluate(self) -> dict[str, Any]:
        """Validate if it is due after this step; return the values to log, otherwise an empty dict."""
        context, config = self.context, self.context.config
        if context.held_out is None or not (self.step % config.validation.every == 0 or self.step == config.steps):
            return {}
        with self.eval_state():
            validation = run_validation(context.denoiser, context.captions, context.held_out, config)
            by_rank = self.validate_ranks(context.held_out) if self.step == config.steps else {}
            if context.callbacks.is_stable(self.step):
                self.best = self.best.update(self.step, validation.loss)
            if self.best.step == self.step and config.validation.keep_best:
                self.best_parameters = {name: p.detach().clone() for name, p in context.parameters.items()}
        return {"validation": asdict(validation), "best": self.best.step == self.step, **by_rank}

    def validate_ranks(self, held_out: HeldOut) -> dict[str, Any]:
        """Validate the adapter truncated to each rank that its method (DyLoRA) trains; empty for other methods."""
        context, losses = self.context, dict[str, float]()
        for rank, truncation in context.callbacks.truncations().items():
            with truncation:
                losses[str(rank)] = run_validation(context.denoiser, context.captions, held_out, context.config).loss
        return {"loss_by_rank": losses} if losses else {}

    def after_step(self) -> bool:
        """Generate sample images and save an intermediate adapter if they are due.

        Returns:
            Whether validation has not improved for `validation.patience` validations.
        """
        config, patience = self.context.config, self.context.config.validation.patience
        if self.step % config.samples.every == 0 or self.step == config.steps:
            self.draw_samples()
        if patience > 0 and self.best.since >= patience:
            return True
        if self.context.accelerator.is_main_process and _is_due(self.step, config.save_every, config):
            self.save_intermediate()
        return False

    def save_state(self, *, stop: bool) -> None:
        """Save the state of the run every `state_every` steps and when it is stopped, so that it can be resumed."""
        context = self.context
        if not (stop or _is_due(self.step, context.config.state_every, context.config)):
            return
        if context.accelerator.is_main_process:
            save_state(context.folder, self.make_state(), self.identity)
        context.accelerator.wait_for_everyone()

    @contextmanager
    def eval_state(self) -> Generator[None]:
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
        """Generate sample images with the adapter in its current state, and call `on_progress`."""
        if self.context.accelerator.is_main_process or self.context.config.compute.shard:
            with self.eval_state():
                draw_previews(self.context, self.step)
        self.on_progress(self.context, self.step)

    def save_intermediate(self) -> None:
        """Save the adapter in its current state to `NAME-stepNNNNNNNN.safetensors`."""
        output = self.context.config.output
        with self.eval_state():
            save_adapter(self.extract_adapter(), output.with_name(f"{output.stem}-step{self.step:08d}.safetensors"))

    def extract_adapter(self) -> Adapter:
        """Return the adapter in its current state, with metadata about the run."""
        context = self.context
        metadata = make_training_metadata(context, self.losses, self.best)
        dtype = torch_dtype(context.config.save_precision)
        adapter = extract_adapter(context.base, context.paths, metadata, dtype)
        learned_tokens = context.learned_tokens
        return replace(adapter, tokens=learned_tokens.extract_tokens(dtype)) if learned_tokens else adapter


def _finalize(context: TrainingContext, trainer: AdapterTrainer, *, stopped: bool) -> TrainResult:
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
