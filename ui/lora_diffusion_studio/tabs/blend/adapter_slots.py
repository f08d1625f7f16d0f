"""The adapter table: a fixed number of places, each shown when an adapter lies on it."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_diffusion_studio.view_models.adapter_card import Card, make_thumbnail
from lora_diffusion_studio.view_models.adapter_slot import (
    CURVES,
    LEAST,
    MOST,
    AdapterSlot,
    get_curve,
    get_option,
    with_curve,
    with_options,
)

SLOTS = 8
FIELDS = ("name", "on", "weight", "unet", "te", "lbw", "start", "stop", "curve", "options", "full")
OWN = ("unet", "te", "lbw", "start", "stop")
"""Options that have controls of their own; all others are in the text."""
MOST_WORDS = 12
"""Trigger words that are offered of one adapter."""


@dataclass(frozen=True, kw_only=True)
class SlotComponents:
    """The components of one adapter slot, by field."""

    group: gr.Group
    face: gr.Image
    about: gr.HTML
    words: gr.Radio
    picture: gr.Image
    fields: dict[str, Any]

    @property
    def outputs(self) -> list[Any]:
        """The components of a slot, in the order of `slot_updates`."""
        return [self.group, self.face, self.about, self.words, *self.fields.values()]


def draw_slot(number: int, blocks: Sequence[str]) -> SlotComponents:
    """One place, empty and hidden."""
    with gr.Group(visible=False, elem_classes="card") as group:
        name = gr.Textbox(visible=False)
        with gr.Row():
            face = gr.Image(
                label=f"Preview of adapter {number}",
                show_label=False,
                container=False,
                height=84,
                width=84,
                min_width=84,
                scale=0,
                format="jpeg",
                interactive=False,
                buttons=[],
                elem_classes="face",
            )
            with gr.Column(scale=2, min_width=150):
                on = gr.Checkbox(True, label=f"Adapter {number}", container=False)
                about = gr.HTML(elem_classes="about")
            weight = gr.Slider(LEAST, MOST, 1.0, step=0.05, label=f"Weight of adapter {number}", scale=3, min_width=180)
        words = gr.Radio([], label="Trigger words: click to say", visible=False, elem_classes="words")
        details, picture = draw_details(blocks)
    fields = {"name": name, "on": on, "weight": weight, **details}
    return SlotComponents(group=group, face=face, about=about, words=words, picture=picture, fields=fields)


def draw_details(blocks: Sequence[str]) -> tuple[dict[str, Any], gr.Image]:
    """What few people set: weights by component and block, and when it acts."""
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
            start = gr.Slider(0, 1, 0, step=0.05, label="From", info="share of the steps", min_width=140)
            stop = gr.Slider(0, 1, 1, step=0.05, label="Until", min_width=140)
            curve = gr.Dropdown(
                list(CURVES.items()),
                value="",
                label="Over the steps",
                info="or linear=0@0.2,1@0.8",
                allow_custom_value=True,
                min_width=140,
            )
        options = gr.Textbox(label="Other options", placeholder="IN04=0.5:*.attn2.*=0:box=0,0,0.5,1")
        full = gr.Textbox(label="Weight in full, from a preset (JSON)", visible=False, lines=2)
        picture = gr.Image(
            label="How it acts", show_label=False, height=150, format="png", interactive=False, buttons=[]
        )
    parts = (unet, te, lbw, start, stop, curve, options, full)
    return dict(zip(FIELDS[3:], parts, strict=True)), picture


def parse_slot(values: Sequence[Any]) -> AdapterSlot | None:
    """Return the slot in the values of its fields; None for an empty one. Raises ConfigError."""
    field = dict(zip(FIELDS, values, strict=True))
    if not field["name"]:
        return None
    row = AdapterSlot(
        name=field["name"],
        on=bool(field["on"]),
        weight=float(field["weight"] or 0),
        options=(field["options"] or "").strip(),
        full=(field["full"] or "").strip(),
    )
    start, stop = float(field["start"] or 0), float(1 if field["stop"] is None else field["stop"])
    row = with_options(
        row,
        unet=(field["unet"] or "").strip(),
        te=(field["te"] or "").strip(),
        lbw=(field["lbw"] or "").strip(),
        start=f"{start:.2f}" if start > 0 else "",
        stop=f"{stop:.2f}" if stop < 1 else "",
    )
    curve = (field["curve"] or "").strip()
    return with_curve(row, curve) if curve else row


def parse_slots(values: Sequence[Any]) -> tuple[AdapterSlot, ...]:
    """Return the slots in the values of all fields. Raises ConfigError."""
    count = len(FIELDS)
    found = (parse_slot(values[start : start + count]) for start in range(0, len(values), count))
    return tuple(row for row in found if row)


def slot_values(row: AdapterSlot | None, card: Card | None) -> list[Any]:
    """Return the field values of a slot."""
    if row is None or card is None:
        return ["", True, 1.0, "", "", "", 0, 1, "", "", gr.update(value="", visible=False)]
    title = row.name.removesuffix(".safetensors")
    rest = with_curve(with_options(row, **dict.fromkeys(OWN, "")), "")
    start, stop = get_option(row, "start"), get_option(row, "stop")
    least, most = min(card.range[0], row.weight), max(card.range[1], row.weight)
    return [
        row.name,
        gr.update(value=row.on, label=title),
        gr.update(value=row.weight, minimum=least, maximum=most, label=f"Weight of {title}"),
        get_option(row, "unet"),
        get_option(row, "te"),
        get_option(row, "lbw"),
        float(start or 0),
        float(stop or 1),
        get_curve(row),
        rest.options,
        gr.update(value=row.full, visible=bool(row.full)),
    ]


def slot_updates(rows: Sequence[AdapterSlot], card_of: Callable[[str], Card]) -> list[Any]:
    """Return the updates that show these slots. Raises ConfigError for an unknown adapter."""
    shown: list[Any] = []
    for number in range(SLOTS):
        row = rows[number] if number < len(rows) else None
        card = card_of(row.name) if row else None
        words = card.triggers[:MOST_WORDS] if card else ()
        about = html.escape(f"{card.about}; usual weight {card.preferred:g}") if card else ""
        picture = make_thumbnail(card.title, card.preview) if card else None
        choice = gr.update(choices=list(words), value=None, visible=bool(words))
        shown += [gr.update(visible=row is not None), picture, about, choice, *slot_values(row, card)]
    return shown
