"""Events of the Blend tab that load all settings from an image, and show them as a command."""

# Gradio's events are untyped.
# pyright: standard

import html
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.form_values import form_updates, read_form
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import QUICK, with_messages


def connect_settings(studio: Studio, blend: BlendTab) -> None:
    """Connect the upload of an image, and the command line."""
    output = blend.output

    @with_messages
    def load_settings(image: str | None) -> list[Any]:
        if not image:
            return [gr.skip()] * (len(blend.form_outputs) + 1)
        form, notes = studio.form_from_image(Path(image))
        message = "Settings loaded." + "".join(f" Note: {html.escape(note)}." for note in notes)
        return [*form_updates(studio, form), message]

    output.image_file.upload(load_settings, output.image_file, [*blend.form_outputs, output.status], **QUICK)

    @with_messages
    def show_command(*values: Any) -> str:
        return studio.format_command(read_form(values))

    output.command_accordion.expand(show_command, blend.form_inputs, output.command, **QUICK)
