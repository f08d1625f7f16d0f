"""What `distill` does between its flags and the training: prompts, adapters and base are read, a file is written."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.train import DataConfig
from lora_diffusion.core.atomic_files import check_output
from lora_diffusion.data.folder import read_dataset
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.models.load import load_base
from lora_diffusion.training.distillation.distill import DistillResult, distill
from lora_diffusion.workflows.images.generate import LoadOptions, load_and_resolve_blend
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
"""What prompts are made of where none are given."""


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Prompts from a file with one per line, from a folder's captions, or else from built-in scenes."""

    file: Path | None = None
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DistillFileResult:
    """A written file, how close it comes to the blend, and notes for the user."""

    path: Path
    result: DistillResult
    notes: tuple[str, ...] = ()


def distill_file(
    request: GenerationRequest,
    source: PromptSource,
    config: DistillConfig,
    output: Path,
    options: LoadOptions,
    *,
    force: bool = False,
) -> DistillFileResult:
    """Distill the blend of a request into an adapter file, written atomically. Its prompt is not used.

    Raises LoRADiffusionError's children, for what can be seen from the input before the first step.
    """
    check_output(output, [Path(entry.path) for entry in request.entries], force=force)
    found = load_and_resolve_blend(request.base, request.entries, options)
    prompts = _load_prompts(source, found.blend)
    base = load_base(request.base, precision=torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32)
    backup = "file" if options.low_memory else "memory"
    result = distill(base, found.blend, request.composition, prompts, config, backup=backup)
    save_adapter(result.adapter, output)
    return DistillFileResult(path=output, result=result, notes=(*request.notes, *found.notes))


def _load_prompts(source: PromptSource, blend: Blend) -> tuple[str, ...]:
    """Load the prompts to distill the blend on. Raises ConfigError, and DatasetError for a folder."""
    if source.file and source.folder:
        raise ConfigError("prompts come from --prompts FILE or from the captions of --data FOLDER; give one of them")
    if source.folder:
        return tuple(example.caption for example in read_dataset(DataConfig(folder=source.folder)))
    return read_prompts(source.file) if source.file else make_scene_prompts(blend)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a text file with one prompt a line") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"{path}: there are no prompts in it; expected one a line")
    return prompts


def make_scene_prompts(blend: Blend) -> tuple[str, ...]:
    """Return each scene with the trigger words of all adapters, in their order."""
    words = [word for entry in blend.entries for word in entry.adapter.metadata.trigger_words]
    return tuple(", ".join([scene, *dict.fromkeys(words)]) for scene in _SCENES)
