"""The Compare tab: an XY grid over two settings, and the effect of each block of an adapter."""

# Gradio's events are untyped.
# pyright: standard

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lora_diffusion.workflows.images.grid import BlockEffect
from lora_diffusion.workflows.images.grid_axes import CHANGES, NOTHING, make_axis
from lora_diffusion_studio.backend.comparison_grid import (
    GridDone,
    format_comparison_commands,
    measure_block_effects,
    render_grid,
)
from lora_diffusion_studio.backend.device_queue import Queued, Stopped
from lora_diffusion_studio.backend.generation import StepDone
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.form_values import read_form
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, build_command_box, session_id, with_messages

_AXIS_LABELS = {
    "guidance": "Guidance scale (CFG)",
    "mode": "Blend mode",
    "block preset": "Block weights",
    NOTHING: "None (single row or column)",
}
"""Labels of the settings on offer, where they differ from the setting's name."""


def build_compare_tab(studio: Studio, blend: BlendTab) -> None:
    """Build the tab and connect its events."""
    gr.Markdown(
        "Generates one image for each combination of the two axes. All other settings are those of the Blend tab. "
        "Separate values with commas, and prompts with `|`."
    )
    with gr.Row():
        axes = [*_build_axis("X", "weight", "0, 0.5, 1"), *_build_axis("Y", "seed", "0, 1, 2")]
    _build_grid(studio, blend, axes)
    adapter = _build_block_effects(studio, blend)
    accordion, command = build_command_box()

    @with_messages
    def show_command(
        x: str, x_values: str, x_of: str, y: str, y_values: str, y_of: str, adapter: str | None, *values: Any
    ) -> str:
        x_axis, y_axis = make_axis(x, x_values or "", x_of or ""), make_axis(y, y_values or "", y_of or "")
        return format_comparison_commands(studio, read_form(values), x_axis, y_axis, adapter or "")

    accordion.expand(show_command, [*axes, adapter, *blend.form_inputs], command, **QUICK)

    def list_adapters(names: list[str]) -> list[Any]:
        choices = [(name.removesuffix(".safetensors"), name) for name in names]
        of_axis = gr.update(choices=[_FIRST_ADAPTER, *choices], value="")
        return [of_axis, of_axis, gr.update(choices=choices, value=names[0] if names else None)]

    blend.adapters.change(list_adapters, blend.adapters, [axes[2], axes[5], adapter], **QUICK)


_FIRST_ADAPTER = ("First adapter", "")


def _build_axis(letter: str, what: str, values: str) -> tuple[gr.Dropdown, gr.Textbox, gr.Dropdown]:
    """Build the setting of an axis, its values, and the adapter that it changes."""
    choices = [(_AXIS_LABELS.get(key, key.replace("_", " ").capitalize()), key) for key in CHANGES]
    with gr.Group():
        setting = gr.Dropdown(choices, value=what, label=f"{letter} setting")
        text = gr.Textbox(values, label=f"{letter} values")
        adapter = gr.Dropdown(
            [_FIRST_ADAPTER], value="", label=f"{letter} adapter", info="For a weight or block weights"
        )
    return setting, text, adapter


def _build_grid(studio: Studio, blend: BlendTab, axes: list[Any]) -> None:
    with gr.Row():
        generate = gr.Button("Generate grid", variant="primary", scale=3)
        stop = gr.Button("Stop", variant="stop", scale=1)
    status = gr.Markdown()
    grid = gr.Image(
        label="Grid", format="png", interactive=False, buttons=["download", "fullscreen"], elem_classes="fit-image"
    )

    @with_messages
    def generate_grid(
        request: gr.Request, x: str, x_values: str, x_of: str, y: str, y_values: str, y_of: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        x_axis, y_axis = make_axis(x, x_values or "", x_of or ""), make_axis(y, y_values or "", y_of or "")
        for event in render_grid(studio, read_form(values), x_axis, y_axis, session_id(request)):
            if isinstance(event, StepDone | Queued | Stopped):
                yield event.text, gr.skip()
            elif isinstance(event, GridDone):
                yield f"Saved grids/{event.path.name} with the settings of every image.", str(event.path)

    inputs = [*axes, *blend.form_inputs]
    generate.click(generate_grid, inputs, [status, grid], show_progress_on=[status], **DEVICE)

    def stop_grid(request: gr.Request) -> None:
        studio.device.stop(session_id(request))

    stop.click(stop_grid, None, None, **QUICK)


def _build_block_effects(studio: Studio, blend: BlendTab) -> gr.Dropdown:
    """Build the measurement of the blocks; returns the choice of the adapter."""
    gr.Markdown(
        "### Block effects\nGenerates the image without each block of an adapter in turn, and measures how much the "
        "image changes."
    )
    with gr.Row():
        adapter = gr.Dropdown([], label="Adapter to measure", min_width=200)
        measure = gr.Button("Measure block effects")
    status = gr.Markdown()
    plot = gr.BarPlot(
        x="block",
        y="change",
        x_title="Block",
        y_title="Change",
        label="Mean pixel change without the block (0 to 255)",
        height=280,
        visible=False,
    )
    gallery = gr.Gallery(
        label="Images without one block",
        format="png",
        columns=6,
        height="auto",
        interactive=False,
        visible=False,
        elem_classes="fit-image compact-gallery",
    )

    @with_messages
    def measure_blocks(request: gr.Request, name: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        for event in measure_block_effects(studio, read_form(values), name or "", session_id(request)):
            if isinstance(event, StepDone | Queued | Stopped):
                yield event.text, gr.skip(), gr.skip()
            elif isinstance(event, tuple):
                images = [(str(effect.path), f"{effect.block}: {effect.change:.2f}") for effect in event]
                plotted = gr.update(value=_plot_data(event), visible=True)
                yield "Finished. Strongest block first.", plotted, gr.update(value=images, visible=True)

    inputs = [adapter, *blend.form_inputs]
    measure.click(measure_blocks, inputs, [status, plot, gallery], show_progress_on=[status], **DEVICE)
    return adapter


def _plot_data(effects: Sequence[BlockEffect]) -> Any:
    """Return the data frame of the bar plot."""
    import pandas as pd

    return pd.DataFrame({"block": [e.block for e in effects], "change": [e.change for e in effects]})
