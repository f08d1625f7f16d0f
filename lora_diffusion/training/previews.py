"""Pictures on the way: the same prompts and seeds at each interval, so that they differ by what was learned."""

from pathlib import Path

import torch

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.inference.sampling import rewrite_prompts, sample, single_settings
from lora_diffusion.models.offload import list_idle_models, on_device
from lora_diffusion.training.setup import TrainingContext

SAMPLES = "samples"


def preview_path(folder: Path, step: int, number: int) -> Path:
    """Where the picture of a prompt after a step is kept in a run's folder."""
    return folder / SAMPLES / f"step-{step:08d}-{number}.png"


@torch.no_grad()
def draw_previews(run: TrainingContext, step: int) -> None:
    """One picture for each prompt, from the base as it stands with what is trained in it; the main process writes.

    Raises OutputError.
    """
    config = run.config.samples
    for number, prompt in enumerate(config.prompts):
        path = preview_path(run.folder, step, number)
        settings = GenerateConfig(prompt=prompt, seed=config.seed, steps=config.steps, guidance=config.guidance)
        (single,) = single_settings(run.base, settings)
        with on_device(run.base, list_idle_models(run.base, text_encoders_learn=False)):
            picture = sample(run.base, rewrite_prompts(single, run.words.rewrite) if run.words else single)
        if run.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as part:
                picture.save(part, format="PNG")
