"""The Adapters tab: look into one, check it, convert it, keep notes beside it; draw several together."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.adapter_library import (
    AdapterNotes,
    convert_adapter,
    draw_plots,
    format_commands,
    inspect_rows,
    read_notes,
    rename_adapter,
    set_preview,
    verify_adapter,
    write_notes,
)
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.layout import BlendTab, list_choices
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, command_box, with_messages
from lora_diffusion_studio.view_models.adapter_slot import LEAST, MOST


def draw_adapters(studio: Studio, blend: BlendTab) -> None:
    """One adapter on the left, several on the right."""
    offered = list_choices(studio, studio.places.bases[0])
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            one = gr.Dropdown(offered, label="Adapter to look at", value=None)
            said = wire_one(studio, blend, one)
        with gr.Column(scale=5, min_width=320):
            wire_notes(studio, blend, one, said)
    several = wire_plots(studio, blend, offered)
    twin, command = command_box("What is done here, on the command line")

    @with_messages
    def as_command(name: str | None, names: list[str] | None, base: str) -> str:
        return format_commands(studio, name or "", names or [], base)

    twin.expand(as_command, [one, several, blend.base], command, **QUICK)


def wire_one(studio: Studio, blend: BlendTab, one: gr.Dropdown) -> gr.Markdown:
    """What is in an adapter, whether it is sound, and a copy in another layout."""
    facts = gr.Dataframe(
        headers=["what", "value"],
        datatype="str",
        column_count=2,
        label="What is in it",
        wrap=True,
        elem_classes="facts",
    )
    check = gr.Button("Verify")
    with gr.Group():
        dialect = gr.Dropdown(["kohya", "native"], value="kohya", label="Convert to")
        turn = gr.Button("Convert")
    result = gr.DownloadButton("Download the copy", visible=False)
    said = gr.Markdown()

    @with_messages
    def look(name: str | None) -> list[list[str]]:
        return [list(row) for row in inspect_rows(studio, name)] if name else []

    one.change(look, one, facts, **QUICK)

    @with_messages
    def verify_one(name: str | None, base: str) -> str:
        return f"```\n{verify_adapter(studio, name or '', base)}\n```"

    check.click(verify_one, [one, blend.base], said, **DEVICE)

    @with_messages
    def convert(name: str | None, dialect: Any) -> tuple[Any, ...]:
        path, text = convert_adapter(studio, name or "", dialect)
        return html.escape(text), gr.update(value=str(path), visible=True)

    turn.click(convert, [one, dialect], [said, result], **DEVICE)
    return said


def wire_notes(studio: Studio, blend: BlendTab, one: gr.Dropdown, said: gr.Markdown) -> None:
    """What is kept beside an adapter, its name, and its preview."""
    with gr.Group():
        with gr.Row():
            weight = gr.Number(1.0, label="Preferred weight", step=0.05, min_width=100)
            least = gr.Number(LEAST, label="Slider from", step=0.5, min_width=80)
            most = gr.Number(MOST, label="Slider to", step=0.5, min_width=80)
        triggers = gr.Textbox(label="Activation text")
        notes = gr.Textbox(label="Notes", lines=2)
        keep = gr.Button("Keep beside the adapter")
    with gr.Group():
        new = gr.Textbox(label="New name of the adapter")
        with gr.Row():
            renaming = gr.Button("Rename it", min_width=90)
            picture = gr.Button("Last picture as preview", min_width=140)

    @with_messages
    def look(name: str | None) -> list[Any]:
        kept = read_notes(studio, name) if name else AdapterNotes()
        return [kept.weight, *kept.range, kept.triggers, kept.notes]

    fields = [weight, least, most, triggers, notes]
    one.change(look, one, fields, **QUICK)

    @with_messages
    def write(name: str | None, weight: float, least: float, most: float, triggers: str, notes: str) -> str:
        ends = float(least or 0), float(most or 0)
        told = AdapterNotes(weight=float(weight or 0), range=ends, triggers=triggers or "", notes=notes or "")
        write_notes(studio, name or "", told)
        return "kept in the JSON file beside it"

    keep.click(write, [one, *fields], said, **QUICK)

    @with_messages
    def rename_one(name: str | None, new: str, base: str) -> list[Any]:
        done = rename_adapter(studio, name or "", new)
        fresh = list_choices(studio, base)
        return [gr.update(choices=fresh, value=done), gr.update(choices=fresh), "renamed"]

    renaming.click(rename_one, [one, new, blend.base], [one, blend.chosen, said], **QUICK)

    @with_messages
    def take(name: str | None, kept: list[str]) -> str:
        if not kept:
            raise gr.Error("there is no picture yet; generate one on the Blend tab", print_exception=False)
        set_preview(studio, name or "", Path(kept[0]))
        return "the last picture is its preview now"

    picture.click(take, [one, blend.stage.kept], said, **QUICK)


def wire_plots(studio: Studio, blend: BlendTab, offered: list[tuple[str, str]]) -> gr.Dropdown:
    """Spectra and norms of adapters, and how they overlap; returns the choice of them."""
    with gr.Row(equal_height=True):
        several = gr.Dropdown(
            offered, label="Adapters to draw together", multiselect=True, max_choices=8, scale=3, min_width=220
        )
        draw = gr.Button("Draw spectra, norms and overlap", scale=1, min_width=160)
    pictures = gr.Gallery(
        label="Plots",
        format="png",
        columns=2,
        height="auto",
        interactive=False,
        object_fit="contain",
        elem_classes="wide",
    )

    @with_messages
    def plot(names: list[str] | None, base: str) -> list[str]:
        return [str(path) for path in draw_plots(studio, names or [], base)]

    draw.click(plot, [several, blend.base], pictures, **DEVICE)
    return several
