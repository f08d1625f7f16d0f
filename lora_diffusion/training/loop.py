"""The one training loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_diffusion.adapter import Adapter, AdapterMetadata
from lora_diffusion.anatomy import trainable_paths
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import ConfigError, TrainingError
from lora_diffusion.files import check_writable
from lora_diffusion.formats.native import save_adapter
from lora_diffusion.models import Base, default_device, load_base, prediction_type
from lora_diffusion.precision import torch_dtype
from lora_diffusion.recipe import library_versions
from lora_diffusion.targets import resolve_targets
from lora_diffusion.training.dataset import Example, data_hash, load_picture, read_dataset
from lora_diffusion.training.examples import LatentPicture, RunOfSamples, collate
from lora_diffusion.training.injection import extract, inject
from lora_diffusion.training.objective import Denoiser, encode_picture

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The adapter, where it lies, and how training went."""

    adapter: Adapter
    path: Path
    first_loss: float
    """Mean loss over the first tenth of the steps."""
    last_loss: float
    """Mean loss over the last tenth."""
    is_main_process: bool = True
    """Whether this is the process that wrote the file and should report."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is about: base, modules, settings and the pictures' hash."""

    base: Base
    paths: tuple[str, ...]
    config: TrainConfig
    data_hash: str


def train(config: TrainConfig) -> TrainResult:
    """Train an adapter as `config` says and write it to `config.output`.

    Everything that can be wrong with the input is checked before the first step. Raises LoRADiffusionError's children.
    """
    examples = read_dataset(config.data)
    AcceleratorState._reset_state()  # it keeps the precision of an earlier run in this process
    accelerator = Accelerator(
        mixed_precision=checked_precision(config), gradient_accumulation_steps=config.gradient_accumulation
    )
    if accelerator.is_main_process:
        check_writable(config.output)
    set_seed(config.seed)
    base = load_base(config.base, device=accelerator.device, precision=torch_dtype(PRECISIONS[config.mixed_precision]))
    base.pipe.vae.float()
    paths = resolve_targets(
        trainable_paths(base.anatomy), unet=config.unet_targets, text_encoders=config.text_encoder_targets
    )
    pictures = cache_latents(base, examples, config.resolution or base.size_px, progress=accelerator.is_main_process)
    parameters = inject(base, paths, config)
    set_seed(config.seed, device_specific=True)  # dropout differs between processes
    run = Run(base=base, paths=paths, config=config, data_hash=data_hash(examples))
    losses = run_steps(accelerator, run, parameters, pictures)
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    adapter = current_adapter(run, steps=config.steps, loss=last)
    if accelerator.is_main_process:
        save_adapter(adapter, config.output)
    accelerator.wait_for_everyone()
    return TrainResult(
        adapter=adapter,
        path=config.output,
        first_loss=first,
        last_loss=last,
        is_main_process=accelerator.is_main_process,
    )


def checked_precision(config: TrainConfig) -> str:
    """The mixed precision, if this machine can do it; raises ConfigError for what would fail after the work is done."""
    if config.output.suffix != ".safetensors":
        raise ConfigError(f"output {str(config.output)!r} does not end in .safetensors; adapters are saved as such")
    if config.mixed_precision == "fp16" and default_device().type == "cpu":
        raise ConfigError("mixed_precision 'fp16' needs a GPU; on the CPU use 'no' or 'bf16'")
    return config.mixed_precision


def cache_latents(
    base: Base, examples: Sequence[Example], size_px: int, *, progress: bool
) -> tuple[LatentPicture, ...]:
    """Encode every picture once."""
    pictures: list[LatentPicture] = []
    for example in tqdm(examples, desc="encode pictures", unit="picture", disable=not progress, leave=False):
        mean, std = encode_picture(base, load_picture(example.picture, size_px))
        pictures.append(LatentPicture(mean=mean, std=std, caption=example.caption))
    return tuple(pictures)


def run_steps(
    accelerator: Accelerator,
    run: Run,
    parameters: dict[str, list[nn.Parameter]],
    pictures: tuple[LatentPicture, ...],
) -> list[float]:
    """All optimizer steps; returns the loss of each. Raises TrainingError if a loss is not finite."""
    config = run.config
    denoiser = Denoiser(run.base, config.resolution or run.base.size_px)
    per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    samples = RunOfSamples(
        pictures,
        length=config.steps * per_step,
        seed=config.seed,
        num_timesteps=denoiser.num_timesteps,
        caption_dropout=config.caption_dropout,
    )
    loader = DataLoader(samples, batch_size=config.batch_size, collate_fn=collate)
    optimiser = new_optimiser(parameters, config)
    schedule = LambdaLR(optimiser, lambda step: rate_fraction(step, config))
    denoiser, optimiser, loader = accelerator.prepare(denoiser, optimiser, loader)
    denoiser.train()
    losses: list[float] = []
    window: list[Tensor] = []
    bar = tqdm(total=config.steps, desc="train", unit="step", disable=not accelerator.is_main_process)
    for batch in loader:
        with accelerator.accumulate(denoiser):
            loss = denoiser(**batch).mean()
            check_finite(loss, len(losses) + 1)
            accelerator.backward(loss)
            window.append(loss.detach())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(optimiser_parameters(optimiser), config.max_gradient_norm)
            optimiser.step()
            optimiser.zero_grad()
        if accelerator.sync_gradients:
            schedule.step()
            losses.append(float(torch.stack(window).mean()))
            window.clear()
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
            if accelerator.is_main_process and is_checkpoint(len(losses), config):
                save_checkpoint(run, losses)
    bar.close()
    return losses


def new_optimiser(parameters: dict[str, list[nn.Parameter]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the text encoders."""
    text_rate = config.text_encoder_learning_rate or config.learning_rate
    groups = [
        {"params": group, "lr": config.learning_rate if component == "unet" else text_rate}
        for component, group in parameters.items()
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def optimiser_parameters(optimiser: Any) -> list[nn.Parameter]:
    return [p for group in optimiser.param_groups for p in group["params"]]


def rate_fraction(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_finite(loss: Tensor, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"the loss at step {step} is {float(loss)}; nothing was written for this step. Lower learning_rate, or "
            "use mixed_precision 'bf16' or 'no'"
        )


def is_checkpoint(step: int, config: TrainConfig) -> bool:
    return config.save_every > 0 and step % config.save_every == 0 and step < config.steps


def save_checkpoint(run: Run, losses: list[float]) -> None:
    step, output = len(losses), run.config.output
    adapter = current_adapter(run, steps=step, loss=sum(losses[-20:]) / len(losses[-20:]))
    save_adapter(adapter, output.with_name(f"{output.stem}-step{step:08d}.safetensors"))


def current_adapter(run: Run, *, steps: int, loss: float) -> Adapter:
    """What has been learned so far, with the record of how."""
    config, base = run.config, run.base
    record = {
        **config.model_dump(mode="json", exclude={"data", "output"}),
        "data": config.data.name,
        "data_hash": run.data_hash,
        "steps_done": steps,
        "loss": round(loss, 6),
        "versions": library_versions(),
    }
    metadata = AdapterMetadata(
        name=config.name or config.output.stem,
        family=base.family.name,
        variant="v-prediction" if prediction_type(base) == "v_prediction" else "",
        base_name=base.name,
        base_hash=base.hash,
        trigger_words=config.trigger_words,
        training=record,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return extract(base, run.paths, metadata, torch_dtype(config.save_precision))
