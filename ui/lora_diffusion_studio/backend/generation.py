"""Image generation: runs a request on the device queue and reports each step, preview and image."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.config.generate import LoadConfig
from lora_diffusion.inference.sampling import decode_preview
from lora_diffusion.workflows.images.generate import load_and_resolve_blend, write_images
from lora_diffusion.workflows.images.request import GenerationRequest
from lora_diffusion_studio.backend.device_queue import Queued, Stopped, Task
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.blend_form import BlendForm

PREVIEW_INTERVAL_S = 0.4
"""Minimum time between two previews, in seconds."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A completed denoising step."""

    text: str
    fraction: float
    """Completed fraction of the whole request."""
    preview: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class ImageSaved:
    """An image that was written to the output folder."""

    path: Path


@dataclass(frozen=True, kw_only=True)
class GenerationDone:
    """All images of a request, with notes for the user."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]
    seconds: float


Event = Queued | StepDone | ImageSaved | GenerationDone | Stopped


def generate(studio: Studio, form: BlendForm, session_id: str = "") -> Iterator[Event]:
    """Generate the images of a form into the output folder.

    Closing the iterator stops the work at the next step and restores the base model.

    Raises:
        LoRADiffusionError: If the form is invalid (at once), or generation fails (while iterating).
    """
    return run_request(studio, studio.make_request(form), session_id)


def run_request(studio: Studio, request: GenerationRequest, session_id: str = "") -> Iterator[Event]:
    """Generate the images of a request; see `generate`."""
    return studio.device.stream(lambda task: _write_images(studio, request, task), session_id)


def _write_images(studio: Studio, request: GenerationRequest, task: Task) -> GenerationDone:
    started = previewed = time.monotonic()
    load = LoadConfig()
    blend = load_and_resolve_blend(request.base, request.entries, load, studio.resolver)
    base = studio.load_base(request.base)
    finished_images = 0

    def on_step(step: DenoisingStep, latents: torch.Tensor) -> None:
        nonlocal previewed
        preview = None
        if time.monotonic() - previewed > PREVIEW_INTERVAL_S:
            preview = decode_preview(base, latents)
            previewed = time.monotonic()
        fraction = (finished_images + (step.index + 1) / step.total) / request.settings.count
        seconds_left = (time.monotonic() - started) * (1 - fraction) / max(fraction, 1e-6)
        text = _describe_progress(finished_images, request.settings.count, step, seconds_left)
        task.send(StepDone(text=text, fraction=fraction, preview=preview))

    def on_image(path: Path, _image: object) -> None:
        nonlocal finished_images
        finished_images += 1
        task.send(ImageSaved(path=path))

    written = write_images(base, blend, request, studio.config.output, load, on_image=on_image, on_step=on_step)
    return GenerationDone(paths=written.paths, notes=written.notes, seconds=time.monotonic() - started)


def _describe_progress(finished: int, count: int, step: DenoisingStep, seconds_left: float) -> str:
    image = f"Image {finished + 1} of {count}, step" if count > 1 else "Step"
    return f"{image} {step.index + 1} of {step.total}, {seconds_left:.0f} s left"
