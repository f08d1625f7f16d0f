"""Train gates over frozen adapters on captioned images, and save the result as a blend preset.

Only the gates are trained (MoLE [arXiv:2404.13628], LoRA Soups [arXiv:2410.13025]), a few dozen scalars, with the same
denoising loss as an adapter. The result is an ordinary `BlendPreset` with scheduled weights, which can be used like any
other preset and costs the same in sampling.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.compatibility import check_family
from lora_diffusion.config.preset import BlendPreset
from lora_diffusion.config.routing import RouteConfig
from lora_diffusion.config.settings import read_toml
from lora_diffusion.config.train import DataConfig, ObjectiveConfig
from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.core.seeding import make_generator
from lora_diffusion.data.buckets import Bucket
from lora_diffusion.data.folder import Example, data_hash, read_dataset
from lora_diffusion.data.sampler import picture_order
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
from lora_diffusion.training.loop import TrainingTask, run_to_end
from lora_diffusion.training.methods.callbacks import MethodCallbacks
from lora_diffusion.training.objectives.denoiser import Denoiser
from lora_diffusion.training.optim.optimizers import adam_settings
from lora_diffusion.training.routing.gates import Gates, gated_base
from lora_diffusion.training.validation import to_device

_NUM_HELD_OUT = 32
"""Number of samples on which the loss is measured before and after training: training images with other noise."""


@dataclass(frozen=True, kw_only=True)
class RouteResult:
    """Result of training gates."""

    preset: BlendPreset
    """The blend preset, as it was saved."""
    path: Path
    """File of the preset."""
    first_loss: float
    """Mean loss on held-out noise with the initial gates."""
    last_loss: float
    """Mean loss on held-out noise with the trained gates."""


_EncodedImages = tuple[tuple[LatentView, str], ...]
"""Encoded images with their captions."""


def _encode_images(base: Base, examples: Sequence[Example], size_px: int) -> _EncodedImages:
    """Center-crop every image to a square and encode it."""
    bucket = Bucket(size_px, size_px)
    encoder = ViewEncoder(base, DataConfig(folder=Path()), NoCache())
    bar = tqdm(examples, desc="encode images", unit="image", leave=False)
    return tuple((encoder.encode(example, bucket, seed=0, variant=0), example.caption) for example in bar)


class _RoutingSamples:
    """Training samples, each a function of the seed and its index.

    Captions are never dropped, because gates are trained for the prompts that the adapters respond to.
    """

    def __init__(self, images: _EncodedImages, num_timesteps: int, *, length: int, seed: int) -> None:
        self.images, self.num_timesteps, self.seed = images, num_timesteps, seed
        self.order = picture_order(len(images), length, seed)

    def __getitem__(self, index: int) -> Sample:
        rng = make_generator(self.seed, index)
        return draw_sample(*self.images[self.order[index]], ObjectiveConfig(), self.num_timesteps, rng)


def route(config: RouteConfig) -> RouteResult:
    """Train gates and save the preset to `config.output`.

    Settings and data are checked before the first step. On the CPU the same settings give the same file.

    Args:
        config: Settings of the training.

    Raises:
        ConfigError: If settings are invalid or adapters cannot be gated.
        DatasetError: If images or captions cannot be used.
        BaseModelError: If the base cannot be loaded.
        AdapterFormatError: If an adapter file cannot be read or does not fit the base.
        FamilyMismatchError: If an adapter was made for another model family.
        TrainingError: If the loss is not finite.
        OutputError: If the preset cannot be written.
    """
    if config.output.suffix != ".json":
        raise ConfigError(
            f"output {str(config.output)!r} does not end in .json, the format of blend presets; change the suffix"
        )
    examples = tuple(example for folder in config.data for example in read_dataset(DataConfig(folder=folder)))
    blend = _read_blend(config)
    check_writable(config.output)
    base = load_base(config.base, precision=torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32)
    gates = Gates(base, blend, num_time_bins=config.num_time_bins, init_value=_initial_gate(config))
    losses = _train_and_measure(gates, examples, config)
    preset = BlendPreset(
        name=config.output.stem,
        description=_describe_training(config, examples, losses),
        base=config.base,
        adapters=config.adapters,
    )
    preset = save_preset(preset, config.output, gates.to_blend(), force=True)
    return RouteResult(preset=preset, path=config.output, first_loss=losses[0], last_loss=losses[1])


def _initial_gate(config: RouteConfig) -> float:
    """Return the initial value of all gates.

    `average` is usually better: the sum of adapters that were trained separately is too strong. On the embedded base
    its loss is twice that of the average.
    """
    return 1 / len(config.adapters) if config.init_value == "average" else config.init_value


def read_route(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> RouteConfig:
    """Read the settings from a TOML file. Relative paths, including those of adapters, are relative to its folder.

    Args:
        path: The file.
        changes: Settings that override those in the file; paths in them are relative to the working directory.

    Raises:
        ConfigError: If the file cannot be read or settings are invalid.
    """
    path, changes = Path(path), changes or {}
    config = read_toml(path, RouteConfig, changes)
    if "adapters" in changes:
        return config
    return config.model_copy(update={"adapters": resolve_entry_paths(config.adapters, path.parent)})


def _read_blend(config: RouteConfig) -> Blend:
    """Load the adapters, and check their family before the base is loaded."""
    family, _ = read_layout(find_base(config.base))
    blend = load_blend(config.adapters).blend
    for entry in blend.entries:
        check_family(entry.adapter.metadata.family, entry.name, base_name=config.base, family=family.name)
    return blend


def _train_and_measure(gates: Gates, examples: tuple[Example, ...], config: RouteConfig) -> tuple[float, float]:
    """Train the gates; return the mean loss on held-out noise before and after."""
    base, size_px = gates.base, config.resolution or gates.base.size_px
    cast(nn.Module, base.vae).float()
    images = _encode_images(base, examples, size_px)
    denoiser = Denoiser(base, ObjectiveConfig())
    training = _RoutingSamples(
        images, denoiser.num_timesteps, length=config.steps * config.batch_size, seed=config.seed
    )
    held_out = _RoutingSamples(images, denoiser.num_timesteps, length=_NUM_HELD_OUT, seed=config.seed + 1)
    with gated_base(gates):
        first = _measure_mean_loss(denoiser, held_out, config.batch_size)
        run_to_end(_make_task(gates, denoiser, training, config))
        last = _measure_mean_loss(denoiser, held_out, config.batch_size)
    check_finite(torch.tensor(last), config.steps)
    return first, last


class _DriftPenalty(MethodCallbacks):
    """Adds the mean squared change of the gates, times a weight, to the loss."""

    def __init__(self, gates: Gates, weight: float) -> None:
        self.gates, self.weight = gates, weight

    def penalty(self) -> Tensor:
        """Return the weighted penalty, a scalar."""
        return self.weight * self.gates.compute_drift()


def _make_task(gates: Gates, denoiser: Denoiser, samples: _RoutingSamples, config: RouteConfig) -> TrainingTask:
    """Return the task of training the gates, with Adam and a cosine learning-rate schedule, inside `gated_base`."""
    denoiser.add_module("gates", gates)  # as a submodule, so that DDP finds the parameters
    size = config.batch_size
    return TrainingTask(
        name="route",
        model=denoiser,
        parameters={"unet.gates": gates.values},
        batches=lambda step: [(_make_routing_batch(denoiser, samples, range(step * size, (step + 1) * size)), 1.0)],
        steps=config.steps,
        optimizer=adam_settings(config.learning_rate),
        callbacks=_DriftPenalty(gates, config.penalty),
    )


@torch.no_grad()
def _measure_mean_loss(denoiser: Denoiser, samples: _RoutingSamples, batch_size: int) -> float:
    """Return the mean loss over all samples; the same samples are drawn at each call."""
    count = len(samples.order)
    chunks = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return float(torch.cat([denoiser(**_make_routing_batch(denoiser, samples, chunk)) for chunk in chunks]).mean())


def _make_routing_batch(denoiser: Denoiser, samples: _RoutingSamples, indices: range) -> dict[str, Any]:
    """Return the denoiser's keyword arguments for the samples of these indices, on its device."""
    return to_device(denoiser, collate([samples[index] for index in indices]))


def _describe_training(config: RouteConfig, examples: tuple[Example, ...], losses: tuple[float, float]) -> str:
    """Describe the training in a sentence, for the preset's description."""
    folders = " and ".join(dict.fromkeys(folder.name for folder in config.data))
    return (
        f"Gates per block and {config.num_time_bins} time bins, trained for {config.steps} steps with batch size "
        f"{config.batch_size} on {folders} ({len(examples)} images, hash {data_hash(examples)[:12]}), seed "
        f"{config.seed}; loss on held-out noise {losses[0]:.4f} -> {losses[1]:.4f}."
    )
