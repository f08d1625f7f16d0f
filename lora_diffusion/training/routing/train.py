"""A routed mixture: gates over frozen adapters, trained in minutes on captioned pictures and saved as a blend preset.

Only the gates learn (MoLE [arXiv:2404.13628], LoRA Soups [arXiv:2410.13025]): some dozens of numbers, on the same
denoising loss as an adapter. The file is an ordinary `BlendPreset`, so that whatever reads one applies the mixture, and
sampling costs what any scheduled blend costs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.compatibility import check_family
from lora_diffusion.config.preset import BlendPreset
from lora_diffusion.config.routing import RouteConfig
from lora_diffusion.config.settings import read_toml
from lora_diffusion.config.train import DataConfig, ObjectiveConfig
from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.folder import Example, data_hash, read_dataset
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.diffusers import read_layout
from lora_diffusion.library.presets import save_preset
from lora_diffusion.library.references import load_blend, resolve_entry_paths
from lora_diffusion.models.load import Base, load_base
from lora_diffusion.models.locate import find_base
from lora_diffusion.training.checks import check_finite
from lora_diffusion.training.inputs.cache import NoCache
from lora_diffusion.training.inputs.latents import LatentView, ViewEncoder
from lora_diffusion.training.inputs.samples import Sample, collate, draw_sample
from lora_diffusion.training.objectives.denoiser import Denoiser
from lora_diffusion.training.routing.gates import Gates, gated_base
from lora_diffusion.training.seeding import picture_order, sample_seed

HELD_OUT = 32
"""Samples that the loss is measured on before and after: the same pictures under noise that training does not see."""


@dataclass(frozen=True, kw_only=True)
class RouteResult:
    """The preset, where it lies, and how training went."""

    preset: BlendPreset
    path: Path
    first_loss: float
    """Mean loss on held-out noise with the gates at their start."""
    last_loss: float
    """The same with the trained gates."""


Pictures = tuple[tuple[LatentView, str], ...]
"""Encoded pictures with their captions."""


def encode_images(base: Base, examples: Sequence[Example], size_px: int) -> Pictures:
    """Every picture cut to a square and encoded once. Raises DatasetError."""
    bucket = Bucket(size_px, size_px)
    encoder = ViewEncoder(base, DataConfig(folder=Path()), NoCache())
    bar = tqdm(examples, desc="encode pictures", unit="picture", leave=False)
    return tuple((encoder.encode(example, bucket, seed=0, variant=0), example.caption) for example in bar)


class RoutingSamples:
    """The samples of a run. No caption is dropped: the gates are to weigh adapters for the prompts that call them."""

    def __init__(self, pictures: Pictures, num_timesteps: int, *, length: int, seed: int) -> None:
        self.pictures, self.num_timesteps, self.seed = pictures, num_timesteps, seed
        self.order = picture_order(len(pictures), length, seed)

    def __getitem__(self, index: int) -> Sample:
        rng = torch.Generator().manual_seed(sample_seed(self.seed, index))
        return draw_sample(*self.pictures[self.order[index]], ObjectiveConfig(), self.num_timesteps, rng)


def route(config: RouteConfig) -> RouteResult:
    """Train gates as `config` says and write the preset to `config.output`, whole or not at all.

    Everything that can be wrong with the input is checked before the first step. The same configuration gives the same
    file on the CPU. Raises LoRADiffusionError's children.
    """
    if config.output.suffix != ".json":
        raise ConfigError(f"output {str(config.output)!r} does not end in .json; a routed mixture is a blend preset")
    examples = tuple(example for folder in config.data for example in read_dataset(DataConfig(folder=folder)))
    blend = read_blend(config)
    check_writable(config.output)
    base = load_base(config.base, precision=torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32)
    gates = Gates(base, blend, stretches=config.stretches, start=initial_gate(config))
    losses = train_and_measure(gates, examples, config)
    preset = BlendPreset(
        name=config.output.stem,
        description=describe_training(config, examples, losses),
        base=config.base,
        adapters=config.adapters,
    )
    preset = save_preset(preset, config.output, gates.to_blend(), force=True)
    return RouteResult(preset=preset, path=config.output, first_loss=losses[0], last_loss=losses[1])


def initial_gate(config: RouteConfig) -> float:
    """Every gate's value at first. An average is where learning is shortest: the sum of adapters that were each trained
    alone overshoots, on the embedded base to twice the average's loss."""
    return 1 / len(config.adapters) if config.start == "average" else config.start


def read_route(path: Path, changes: Mapping[str, Any] | None = None) -> RouteConfig:
    """The settings in a TOML file, as `read_toml`; relative paths of adapters start at its folder as well.

    Raises ConfigError.
    """
    changes = changes or {}
    config = read_toml(path, RouteConfig, changes)
    if "adapters" in changes:
        return config
    return config.model_copy(update={"adapters": resolve_entry_paths(config.adapters, path.parent)})


def read_blend(config: RouteConfig) -> Blend:
    """The adapters of a configuration. Raises FamilyMismatchError, before the base is loaded, and ConfigError."""
    family, _ = read_layout(find_base(config.base))
    blend = load_blend(config.adapters).blend
    for entry in blend.entries:
        check_family(entry.adapter.metadata.family, entry.name, base_name=config.base, family=family.name)
    return blend


def train_and_measure(gates: Gates, examples: tuple[Example, ...], config: RouteConfig) -> tuple[float, float]:
    """Train the gates; returns the mean loss on held-out noise before and after. Raises TrainingError."""
    base, size_px = gates.base, config.resolution or gates.base.size_px
    base.pipe.vae.float()
    pictures = encode_images(base, examples, size_px)
    denoiser = Denoiser(base, ObjectiveConfig())
    training = RoutingSamples(
        pictures, denoiser.num_timesteps, length=config.steps * config.batch_size, seed=config.seed
    )
    held_out = RoutingSamples(pictures, denoiser.num_timesteps, length=HELD_OUT, seed=config.seed + 1)
    with gated_base(gates):
        first = measure_mean_loss(denoiser, held_out, config.batch_size)
        train_gates(gates, denoiser, training, config)
        last = measure_mean_loss(denoiser, held_out, config.batch_size)
    check_finite(torch.tensor(last), config.steps)
    return first, last


def train_gates(gates: Gates, denoiser: Denoiser, samples: RoutingSamples, config: RouteConfig) -> None:
    """All optimizer steps, inside `gated_base`. Raises TrainingError if a loss is not finite.

    Adam, whose rate falls to 0 by a cosine, so that the gates come to rest.
    """
    optimizer = torch.optim.Adam([gates.values], lr=config.learning_rate)
    schedule = CosineAnnealingLR(optimizer, config.steps)
    each = make_batches(denoiser, samples, config.batch_size)
    for step, batch in enumerate(tqdm(each, total=config.steps, desc="route", unit="step"), start=1):
        loss = denoiser(**batch).mean()
        check_finite(loss.detach(), step)
        optimizer.zero_grad()
        (loss + config.penalty * gates.compute_drift()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure_mean_loss(denoiser: Denoiser, samples: RoutingSamples, batch_size: int) -> float:
    """Over the same samples at each call."""
    return float(torch.cat([denoiser(**batch) for batch in make_batches(denoiser, samples, batch_size)]).mean())


def make_batches(denoiser: Denoiser, samples: RoutingSamples, size: int) -> Iterator[dict[str, Any]]:
    """The denoiser's arguments, batch by batch, on its device."""
    device = denoiser.alphas_cumprod.device
    for start in range(0, len(samples.order), size):
        batch = collate([samples[index] for index in range(start, min(start + size, len(samples.order)))])
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def describe_training(config: RouteConfig, examples: tuple[Example, ...], losses: tuple[float, float]) -> str:
    """How the mixture came about, in a sentence."""
    folders = " and ".join(dict.fromkeys(folder.name for folder in config.data))
    return (
        f"Gates by block and {config.stretches} stretches of steps, trained for {config.steps} steps of "
        f"{config.batch_size} on {folders} ({len(examples)} pictures, hash {data_hash(examples)[:12]}), seed "
        f"{config.seed}; loss on held-out noise {losses[0]:.4f} -> {losses[1]:.4f}."
    )
