"""Sample images during training.

The prompts and seeds stay the same during the whole run, so differences between images come from training alone.
"""

import os
from pathlib import Path

import torch

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.inference.sampling import rewrite_prompts, sample, single_settings
from lora_diffusion.models.offload import list_idle_models, on_device
from lora_diffusion.training.setup import TrainingContext

SAMPLES = "samples"
"""Name of the folder for sample images in a run's folder."""


def preview_path(folder: str | os.PathLike[str], step: int, number: int) -> Path:
    """Return the path of a sample image.

    Args:
        folder: The run's folder.
        step: Number of optimizer steps done.
        number: Index of the prompt in `samples.prompts`.
    """
    return Path(folder) / SAMPLES / f"step-{step:08d}-{number}.png"


@torch.no_grad()
def draw_previews(run: TrainingContext, step: int) -> None:
    """Generate one image per prompt with the adapter in its current state; the main process saves them.

    Raises:
        OutputError: If an image cannot be written.
    """
    config = run.config.samples
    for number, prompt in enumerate(config.prompts):
        path = preview_path(run.folder, step, number)
        settings = GenerateConfig(
            prompt=prompt,
            seed=config.seed,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        (single,) = single_settings(run.base, settings)
        if run.learned_tokens:
            single = rewrite_prompts(single, run.learned_tokens.rewrite)
        with on_device(run.base, list_idle_models(run.base, text_encoders_learn=False)):
            image = sample(run.base, single)
        if run.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as part:
                image.save(part, format="PNG")
