"""The Adapters tab: look into one, check it, convert it, keep notes beside it; draw several together."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from ui.shelf import converted, facts_of, notes_of, plots, rename, set_preview, verified, write_notes
from ui.studio import Studio
from ui.tabs.blend import Blend, choices
from ui.tabs.events import DEVICE, QUICK, spoken


def draw_adapters(studio: Studio, blend: Blend) -> None:
    """One adapter on the left, several on the right."""
    offered = choices(studio, studio.places.bases[0])
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            one = gr.Dropdown(offered, label="Adapter to look at", value=None)
            said = wire_one(studio, blend, one)
        with gr.Column(scale=5, min_width=320):
            wire_notes(studio, blend, one, said)
            wire_plots(studio, blend, offered)


def wire_one(studio: Studio, blend: Blend, one: gr.Dropdown) -> gr.Markdown:
    """What is in an adapter, whether it is sound, and a copy in another layout."""
    facts = gr.Dataframe(headers=["what", "value"], datatype="str", column_count=2, label="What is in it", wrap=True)
    with gr.Row():
        check = gr.Button("Verify", min_width=90)
        dialect = gr.Dropdown(["kohya", "native"], value="kohya", label="Convert to", min_width=120)
        turn = gr.Button("Convert", min_width=90)
    result = gr.DownloadButton("Download the copy", visible=False)
    said = gr.Markdown()

    @spoken
    def look(name: str | None) -> list[list[str]]:
        return [list(row) for row in facts_of(studio, name)] if name else []

    one.change(look, one, facts, **QUICK)

    @spoken
    def verify_one(name: str | None, base: str) -> str:
        return f"```\n{verified(studio, name or '', base)}\n```"

    check.click(verify_one, [one, blend.base], said, **DEVICE)

    @spoken
    def convert(name: str | None, dialect: Any) -> tuple[Any, ...]:
        path, text = converted(studio, name or "", dialect)
        return html.escape(text), gr.update(value=str(path), visible=True)

    turn.click(convert, [one, dialect], [said, result], **DEVICE)
    return said


def wire_notes(studio: Studio, blend: Blend, one: gr.Dropdown, said: gr.Markdown) -> None:
    """What is kept beside an adapter, its name, and its preview."""
    with gr.Group():
        weight = gr.Number(1.0, label="Preferred weight", step=0.05)
        triggers = gr.Textbox(label="Activation text")
        notes = gr.Textbox(label="Notes", lines=2)
        keep = gr.Button("Keep beside the adapter")
    with gr.Row():
        new = gr.Textbox(label="New name of the adapter", min_width=140)
        renaming = gr.Button("Rename it", min_width=90)
        picture = gr.Button("Last picture as preview", min_width=140)

    @spoken
    def look(name: str | None) -> list[Any]:
        kept = notes_of(studio, name) if name else {}
        return [kept.get("preferred weight", 1.0), kept.get("activation text", ""), kept.get("notes", "")]

    one.change(look, one, [weight, triggers, notes], **QUICK)

    @spoken
    def write(name: str | None, weight: float, triggers: str, notes: str) -> str:
        write_notes(studio, name or "", weight=float(weight or 0), triggers=triggers or "", notes=notes or "")
        return "kept in the JSON file beside it"

    keep.click(write, [one, weight, triggers, notes], said, **QUICK)

    @spoken
    def rename_one(name: str | None, new: str, base: str) -> list[Any]:
        done = rename(studio, name or "", new)
        fresh = choices(studio, base)
        return [gr.update(choices=fresh, value=done), gr.update(choices=fresh), "renamed"]

    renaming.click(rename_one, [one, new, blend.base], [one, blend.chosen, said], **QUICK)

    @spoken
    def take(name: str | None, kept: list[str]) -> str:
        if not kept:
            raise gr.Error("there is no picture yet; generate one on the Blend tab", print_exception=False)
        set_preview(studio, name or "", Path(kept[0]))
        return "the last picture is its preview now"

    picture.click(take, [one, blend.stage.kept], said, **QUICK)


def wire_plots(studio: Studio, blend: Blend, offered: list[tuple[str, str]]) -> None:
    """Spectra and norms of adapters, and how they overlap."""
    several = gr.Dropdown(offered, label="Adapters to draw", multiselect=True, max_choices=8)
    draw = gr.Button("Draw spectra, norms and overlap")
    pictures = gr.Gallery(
        label="Plots", format="png", columns=2, height=420, interactive=False, object_fit="contain", elem_classes="wide"
    )

    @spoken
    def plot(names: list[str] | None, base: str) -> list[str]:
        return [str(path) for path in plots(studio, names or [], base)]

    draw.click(plot, [several, blend.base], pictures, **DEVICE)
