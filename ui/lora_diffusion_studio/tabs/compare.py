"""The Compare tab: a grid over two settings, and what each block of an adapter does."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lora_diffusion.workflows.images.grid_axes import CHANGES, NOTHING, make_axis
from lora_diffusion_studio.backend.comparison_grid import GridDone, compare_commands, measure_block_effects, render_grid
from lora_diffusion_studio.backend.device_queue import Halted, Waiting
from lora_diffusion_studio.backend.studio import StepTaken, Studio
from lora_diffusion_studio.tabs.blend.layout import BlendTab, form_from
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, command_box, visitor_id, with_messages


def draw_compare(studio: Studio, blend: BlendTab) -> None:
    """Two axes, one grid; below, the blocks."""
    gr.Markdown("Everything else is as on the Blend tab. Values have commas between them, prompts a `|`.")
    with gr.Row():
        sides = [*draw_axis("Across", "weight", "0, 0.5, 1"), *draw_axis("Down", "seed", "0, 1, 2")]
    wire_grid(studio, blend, sides)
    of = wire_blocks(studio, blend)
    twin, command = command_box("The same grid and block analysis on the command line")

    @with_messages
    def as_command(x: str, xs: str, xof: str, y: str, ys: str, yof: str, of: str | None, *values: Any) -> str:
        across, down = make_axis(x, xs or "", xof or ""), make_axis(y, ys or "", yof or "")
        return compare_commands(studio, form_from(values), across, down, of or "")

    twin.expand(as_command, [*sides, of, *blend.form_inputs], command, **QUICK)

    def on_table(chosen: list[str]) -> list[Any]:
        sides = gr.update(choices=["", *chosen], value="")
        return [sides, sides, gr.update(choices=chosen, value=(chosen or [None])[0])]

    blend.chosen.change(on_table, blend.chosen, [sides[2], sides[5], of], **QUICK)


def draw_axis(side: str, what: str, values: str) -> tuple[gr.Dropdown, gr.Textbox, gr.Dropdown]:
    """What changes along a side of the grid."""
    with gr.Group():
        kind = gr.Dropdown([*CHANGES], value=what, label=side, info=f"`{NOTHING}` for a single line")
        text = gr.Textbox(values, label=f"Values {side.lower()}")
        of = gr.Dropdown([""], value="", label=f"Of which adapter {side.lower()}", info="the first, if empty")
    return kind, text, of


def wire_grid(studio: Studio, blend: BlendTab, sides: list[Any]) -> None:
    """The grid, picture by picture, until it is stopped."""
    with gr.Row():
        go = gr.Button("Draw the grid", variant="primary", scale=3)
        stop = gr.Button("Stop", variant="stop", scale=1)
    status = gr.Markdown()
    sheet = gr.Image(
        label="Grid", format="png", interactive=False, buttons=["download", "fullscreen"], elem_classes="picture"
    )

    @with_messages
    def draw(
        request: gr.Request, x: str, xs: str, xof: str, y: str, ys: str, yof: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        across, down = make_axis(x, xs or "", xof or ""), make_axis(y, ys or "", yof or "")
        for event in render_grid(studio, form_from(values), across, down, visitor_id(request)):
            if isinstance(event, StepTaken | Waiting | Halted):
                yield event.text, gr.skip()
            elif isinstance(event, GridDone):
                yield f"{event.path.name} is in the folder `grids`, with how it was made inside", str(event.path)

    go.click(draw, [*sides, *blend.form_inputs], [status, sheet], show_progress_on=[status], **DEVICE)

    def halt(request: gr.Request) -> None:
        studio.device.stop(visitor_id(request))

    stop.click(halt, None, None, **QUICK)


def wire_blocks(studio: Studio, blend: BlendTab) -> gr.Dropdown:
    """How much each block counts; returns the choice of an adapter."""
    gr.Markdown(
        "### Block by block\nLeaves one block of an adapter out at a time, and measures how much the picture changes."
    )
    with gr.Row():
        of = gr.Dropdown([], label="Adapter on the table", min_width=200)
        measure = gr.Button("Measure its blocks")
    status = gr.Markdown()
    bars = gr.BarPlot(
        x="block", y="change", label="Mean change of a pixel, of 255, without the block", height=280, visible=False
    )
    gallery = gr.Gallery(
        label="Pictures without the block",
        format="png",
        columns=6,
        height="auto",
        interactive=False,
        visible=False,
        elem_classes="picture tidy",
    )

    @with_messages
    def blocks(request: gr.Request, name: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        for event in measure_block_effects(studio, form_from(values), name or "", visitor_id(request)):
            if isinstance(event, StepTaken | Waiting | Halted):
                yield event.text, gr.skip(), gr.skip()
            elif isinstance(event, tuple):
                pictures = [(str(effect.path), f"{effect.block}: {effect.change:.2f}") for effect in event]
                table = gr.update(value=effects_table(event), visible=True)
                yield "done; the strongest first", table, gr.update(value=pictures, visible=True)

    measure.click(blocks, [of, *blend.form_inputs], [status, bars, gallery], show_progress_on=[status], **DEVICE)
    return of


def effects_table(effects: tuple[Any, ...]) -> Any:
    """Return the data of the bar plot."""
    import pandas as pd

    return pd.DataFrame({"block": [e.block for e in effects], "change": [e.change for e in effects]})
