"""The Compare tab: a grid over two settings, and what each block of an adapter does."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ui.comparing import AXES, NOTHING, Sheet, axis, compared, without_blocks
from ui.rendering import Halted, Waiting
from ui.studio import Step, Studio
from ui.tabs.blend import Blend, form_from
from ui.tabs.events import DEVICE, QUICK, spoken, visitor_of


def draw_compare(studio: Studio, blend: Blend) -> None:
    """Two axes, one grid; below, the blocks."""
    gr.Markdown("Everything else is as on the Blend tab. Values have commas between them, prompts a `|`.")
    with gr.Row():
        across, across_values, across_of = draw_axis("Across", "weight", "0, 0.5, 1")
        down, down_values, down_of = draw_axis("Down", "seed", "0, 1, 2")
    with gr.Row():
        go = gr.Button("Draw the grid", variant="primary")
        stop = gr.Button("Stop", variant="stop")
    status = gr.Markdown()
    sheet = gr.Image(
        label="Grid", format="png", interactive=False, buttons=["download", "fullscreen"], elem_classes="picture"
    )
    gr.Markdown(
        "### Block by block\nLeaves one block of an adapter out at a time, and measures how much the picture changes."
    )
    with gr.Row():
        of = gr.Dropdown([], label="Adapter on the table", min_width=200)
        measure = gr.Button("Measure its blocks")
    bars = gr.BarPlot(x="block", y="change", label="Mean change of a pixel, of 255, without the block", height=240)
    gallery = gr.Gallery(label="Pictures without the block", format="png", columns=6, height=260, interactive=False)

    @spoken
    def draw(
        request: gr.Request, x: str, xs: str, xof: str, y: str, ys: str, yof: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        horizontal, vertical = axis(x, xs or "", xof or ""), axis(y, ys or "", yof or "")
        for event in compared(studio, form_from(values), horizontal, vertical, visitor_of(request)):
            if isinstance(event, Step | Waiting | Halted):
                yield event.text, gr.skip()
            elif isinstance(event, Sheet):
                yield f"{event.path.name} is in the folder `grids`, with how it was made inside", str(event.path)

    sides = [across, across_values, across_of, down, down_values, down_of]
    go.click(draw, [*sides, *blend.form_inputs], [status, sheet], show_progress_on=[status], **DEVICE)

    @spoken
    def blocks(request: gr.Request, name: str | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        for event in without_blocks(studio, form_from(values), name or "", visitor_of(request)):
            if isinstance(event, Step | Waiting | Halted):
                yield event.text, gr.skip(), gr.skip()
            elif isinstance(event, list):
                pictures = [(str(effect.path), f"{effect.block}: {effect.change:.2f}") for effect in event]
                yield "done; the strongest first", table_of(event), pictures

    measure.click(blocks, [of, *blend.form_inputs], [status, bars, gallery], show_progress_on=[status], **DEVICE)

    def halt(request: gr.Request) -> None:
        studio.device.stop(visitor_of(request))

    stop.click(halt, None, None, **QUICK)

    def on_table(chosen: list[str]) -> list[Any]:
        return [gr.update(choices=["", *chosen], value="")] * 2 + [
            gr.update(choices=chosen, value=(chosen or [None])[0])
        ]

    blend.chosen.change(on_table, blend.chosen, [across_of, down_of, of], **QUICK)


def table_of(effects: list[Any]) -> Any:
    """What the bar plot takes."""
    import pandas as pd

    return pd.DataFrame({"block": [e.block for e in effects], "change": [e.change for e in effects]})


def draw_axis(side: str, what: str, values: str) -> tuple[gr.Dropdown, gr.Textbox, gr.Dropdown]:
    """What changes along a side of the grid."""
    with gr.Group():
        kind = gr.Dropdown([*AXES], value=what, label=side, info=f"`{NOTHING}` for a single line")
        text = gr.Textbox(values, label=f"Values {side.lower()}")
        of = gr.Dropdown([""], value="", label=f"Of which adapter {side.lower()}", info="the first, if empty")
    return kind, text, of
