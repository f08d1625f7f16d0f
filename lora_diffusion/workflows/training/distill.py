"""Distillation of a blend into one adapter file, with the choice of its prompts."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import LoadConfig
from lora_diffusion.config.train import DataConfig
from lora_diffusion.core.atomic_files import check_output
from lora_diffusion.data.folder import read_dataset
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.library.references import AdapterResolver
from lora_diffusion.models.load import load_base
from lora_diffusion.training.distillation.distill import DistillResult, distill
from lora_diffusion.workflows.images.generate import load_and_resolve_blend
from lora_diffusion.workflows.images.request import GenerationRequest

_SCENES = (
    "a picture",
    "a portrait",
    "a cat in a forest",
    "a house in the snow",
    "a boat on the beach at sunset",
    "a car in a city at night",
    "a tree in the mountains",
    "a flower in a desert",
    "a dog on a street in the rain",
    "a bird in the sky at sunset",
    "a castle in the mountains at night",
    "a person in a room",
)
"""Prompts for distillation if none are given; the trigger words of the adapters are appended."""


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where the prompts come from; built-in scenes without a file or folder."""

    file: str | os.PathLike[str] | None = None
    """Text file with one prompt per line."""
    folder: str | os.PathLike[str] | None = None
    """Folder of training pictures whose captions are used."""


@dataclass(frozen=True, kw_only=True)
class DistillFileResult:
    """A distilled adapter file."""

    path: Path
    """The written file."""
    result: DistillResult
    """The adapter, and how close it comes to the blend."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""


def distill_file(
    request: GenerationRequest,
    source: PromptSource,
    config: DistillConfig,
    output: str | os.PathLike[str],
    load: LoadConfig,
    resolver: AdapterResolver | None = None,
    *,
    force: bool = False,
) -> DistillFileResult:
    """Distill the blend of a request into an adapter file, which is written atomically.

    Args:
        request: Base, adapters and composition of the blend; its prompt and sampling settings are not used.
        source: Where the training prompts come from.
        config: Settings of the distillation.
        output: The .safetensors file to write.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.
        force: Whether an existing file may be replaced.

    Raises:
        LoRADiffusionError: If an input is invalid; this is checked before the first training step.
    """
    output = Path(output)
    check_output(output, [Path(entry.path) for entry in request.entries], force=force)
    resolved = load_and_resolve_blend(request.base, request.entries, load, resolver)
    prompts = _load_prompts(source, resolved.blend)
    base = load_base(request.base, precision=torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32)
    backup = "file" if load.low_memory else "memory"
    result = distill(base, resolved.blend, request.composition, prompts, config, backup=backup)
    save_adapter(result.adapter, output)
    return DistillFileResult(path=output, result=result, notes=(*request.notes, *resolved.notes))


def _load_prompts(source: PromptSource, blend: Blend) -> tuple[str, ...]:
    """Load the prompts on which the blend is distilled."""
    if source.file and source.folder:
        raise ConfigError("--prompts FILE and --data FOLDER are both given; give one source of prompts")
    if source.folder:
        return tuple(example.caption for example in read_dataset(DataConfig(folder=Path(source.folder))))
    return read_prompts(source.file) if source.file else make_scene_prompts(blend)


def read_prompts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a UTF-8 text file with one prompt per line; empty lines are skipped.

    Raises:
        ConfigError: If the file cannot be read or contains no prompt.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a text file with one prompt per line") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"{path}: contains no prompts; expected one per line")
    return prompts


def make_scene_prompts(blend: Blend) -> tuple[str, ...]:
    """Return the built-in scenes, each followed by the trigger words of all adapters in the order of the blend."""
    words = [word for entry in blend.entries for word in entry.adapter.metadata.trigger_words]
    return tuple(", ".join([scene, *dict.fromkeys(words)]) for scene in _SCENES)
