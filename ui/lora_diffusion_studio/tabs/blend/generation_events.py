"""Events of the Blend tab that generate images: Generate, Stop, weight sliders, and the comparison with the base."""

# Gradio's events are untyped.
# pyright: standard

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.device_queue import Queued, Stopped
from lora_diffusion_studio.backend.generation import GenerationDone, ImageSaved, StepDone, generate
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.form_values import read_form
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, session_id, with_messages
from lora_diffusion_studio.view_models.blend_form import BlendForm, with_next_seed

MAX_GALLERY_IMAGES = 48


def connect_generation(studio: Studio, blend: BlendTab) -> None:
    """Connect Generate, Stop, and the release of a weight slider."""
    output, settings = blend.output, blend.settings

    @with_messages
    def generate_images(
        request: gr.Request, seed_mode: str, paths: list[str], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        form = with_next_seed(read_form(values), seed_mode)
        for event in generate(studio, form, session_id(request)):
            if isinstance(event, StepDone):
                preview = {} if event.preview is None else {output.image: event.preview}
                yield {output.status: event.text, **preview}
            elif isinstance(event, Queued | Stopped):
                yield {output.status: event.text}
            elif isinstance(event, ImageSaved):
                paths = [str(event.path), *paths][:MAX_GALLERY_IMAGES]
                yield {output.image: str(event.path), output.gallery: paths, output.image_paths: paths}
            else:
                used = {name: form.settings.get(name, 0) for name in ("seed", "variation", "variation_seed")}
                used["seed"] += len(event.paths) if seed_mode == "increment" else 0
                yield {output.status: _describe_done(event), **{settings[name]: value for name, value in used.items()}}

    @with_messages
    def generate_live(request: gr.Request, live: bool, *values: Any) -> Iterator[dict[Any, Any]]:
        yield {output.status: gr.skip()}  # a generator that yields nothing would clear every output
        if live:
            yield from generate_images(request, *values)

    seeds = [settings[name] for name in ("seed", "variation", "variation_seed")]
    outputs = [output.status, output.image, output.gallery, output.image_paths, *seeds]
    inputs = [output.seed_mode, output.image_paths, *blend.form_inputs]
    output.generate.click(generate_images, inputs, outputs, show_progress_on=[output.status], **DEVICE)
    gr.on(
        [slot.fields["weight"].release for slot in blend.slots],
        generate_live,
        [output.live, *inputs],
        outputs,
        show_progress_on=[output.status],
        trigger_mode="always_last",
        **DEVICE,
    )

    def stop(request: gr.Request) -> None:
        studio.device.stop(session_id(request))

    output.stop.click(stop, None, None, **QUICK)


def connect_comparison(studio: Studio, blend: BlendTab) -> None:
    """Connect the button that shows the last image beside that of the base model with the same settings."""
    output = blend.output

    @with_messages
    def compare(request: gr.Request, paths: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        form = read_form(values)
        if not paths:
            raise gr.Error("there is no image to compare yet; generate one first", print_exception=False)
        base_only = BlendForm(base=form.base, settings={**form.settings, "count": 1})
        for event in generate(studio, base_only, session_id(request)):
            if isinstance(event, StepDone | Queued | Stopped):
                yield event.text, gr.skip()
            elif isinstance(event, ImageSaved):
                images = str(event.path), paths[0]
                yield "Left: base model. Right: blend.", gr.update(value=images, visible=True)

    output.compare.click(
        compare,
        [output.image_paths, *blend.form_inputs],
        [output.status, output.comparison],
        show_progress_on=[output.status],
        **DEVICE,
    )


def _describe_done(event: GenerationDone) -> str:
    names = ", ".join(path.name for path in event.paths)
    notes = "".join(f" Note: {html.escape(note)}." for note in event.notes)
    return f"Saved {html.escape(names)} in {event.seconds:.1f} s.{notes}"
