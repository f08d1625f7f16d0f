"""The adapter table: a fixed number of places, each shown when an adapter lies on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.rows import LEAST, MOST, Row, option, told

SLOTS = 8
FIELDS = ("name", "on", "weight", "unet", "te", "lbw", "start", "stop", "options", "full")
OWN = ("unet", "te", "lbw", "start", "stop")
"""Options that have controls of their own; all others are in the text."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The components of one place, by field."""

    group: gr.Group
    about: gr.Markdown
    trigger: gr.Button
    picture: gr.Image
    fields: dict[str, Any]


def draw_slot(number: int, blocks: Sequence[str]) -> Slot:
    """One place, empty and hidden."""
    with gr.Group(visible=False, elem_classes="card") as group:
        name = gr.Textbox(visible=False)
        with gr.Row(equal_height=True):
            on = gr.Checkbox(True, label=f"Adapter {number}", scale=2, min_width=120)
            weight = gr.Slider(LEAST, MOST, 1.0, step=0.05, label=f"Weight of adapter {number}", scale=4, min_width=180)
            trigger = gr.Button("", size="sm", visible=False, scale=1, min_width=90)
        about = gr.Markdown(elem_classes="about")
        with gr.Accordion("More", open=False):
            with gr.Row():
                unet = gr.Textbox(label="UNet weight", placeholder="as above", min_width=110)
                te = gr.Textbox(label="Text encoder weight", placeholder="as above", min_width=110)
                lbw = gr.Dropdown(
                    ["", *blocks],
                    value="",
                    label="Blocks",
                    info="preset, or values with commas",
                    allow_custom_value=True,
                )
            with gr.Row():
                start = gr.Slider(0, 1, 0, step=0.05, label="From", info="share of the steps")
                stop = gr.Slider(0, 1, 1, step=0.05, label="Until")
            options = gr.Textbox(
                label="Other options", placeholder="IN04=0.5:*.attn2.*=0:linear=0@0.2,1@0.8:box=0,0,0.5,1"
            )
            full = gr.Textbox(label="Weight in full, from a preset (JSON)", visible=False, lines=2)
            picture = gr.Image(
                label="How it acts", show_label=False, height=150, format="png", interactive=False, buttons=[]
            )
    fields: dict[str, Any] = dict(
        zip(FIELDS, (name, on, weight, unet, te, lbw, start, stop, options, full), strict=True)
    )
    return Slot(group=group, about=about, trigger=trigger, picture=picture, fields=fields)


def row_from(values: Sequence[Any]) -> Row | None:
    """The row in the values of a place's fields; None for an empty place."""
    field = dict(zip(FIELDS, values, strict=True))
    if not field["name"]:
        return None
    row = Row(
        name=field["name"],
        on=bool(field["on"]),
        weight=float(field["weight"] or 0),
        options=(field["options"] or "").strip(),
        full=(field["full"] or "").strip(),
    )
    start, stop = float(field["start"] or 0), float(1 if field["stop"] is None else field["stop"])
    return told(
        row,
        unet=(field["unet"] or "").strip(),
        te=(field["te"] or "").strip(),
        lbw=(field["lbw"] or "").strip(),
        start=f"{start:.2f}" if start > 0 else "",
        stop=f"{stop:.2f}" if stop < 1 else "",
    )


def rows_from(values: Sequence[Any]) -> tuple[Row, ...]:
    """The rows in the values of all places."""
    count = len(FIELDS)
    found = (row_from(values[start : start + count]) for start in range(0, len(values), count))
    return tuple(row for row in found if row)


def values_of(row: Row | None) -> list[Any]:
    """What a row puts into the fields of a place."""
    if row is None:
        return ["", True, 1.0, "", "", "", 0, 1, "", gr.update(value="", visible=False)]
    title = row.name.removesuffix(".safetensors")
    rest = told(row, **dict.fromkeys(OWN, ""))
    start, stop = option(row, "start"), option(row, "stop")
    return [
        row.name,
        gr.update(value=row.on, label=title),
        gr.update(value=min(max(row.weight, LEAST), MOST), label=f"Weight of {title}"),
        option(row, "unet"),
        option(row, "te"),
        option(row, "lbw"),
        float(start or 0),
        float(stop or 1),
        rest.options,
        gr.update(value=row.full, visible=bool(row.full)),
    ]


def updates(rows: Sequence[Row], about: Callable[[Row], tuple[str, tuple[str, ...]]]) -> list[Any]:
    """What shows these rows: for every place its group, its text, its trigger button, and its fields."""
    shown: list[Any] = []
    for number in range(SLOTS):
        row = rows[number] if number < len(rows) else None
        text, triggers = about(row) if row else ("", ())
        button = gr.update(value=f"+ {triggers[0]}" if triggers else "", visible=bool(triggers))
        shown += [gr.update(visible=row is not None), text, button, *values_of(row)]
    return shown
