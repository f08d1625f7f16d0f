"""The Adapters tab: shows, verifies, converts and renames an adapter, edits its notes, and plots several."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.adapter_library import (
    AdapterNotes,
    convert_adapter,
    format_library_commands,
    inspect_rows,
    read_notes,
    rename_adapter,
    save_plots,
    set_preview,
    verify_adapter,
    write_notes,
)
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_gallery import adapter_choices
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, build_command_box, with_messages
from lora_diffusion_studio.view_models.adapter_slot import MAX_WEIGHT, MIN_WEIGHT

_FORMATS = [("kohya (A1111, ComfyUI)", "kohya"), ("diffusers / PEFT", "native")]


def build_adapters_tab(studio: Studio, blend: BlendTab) -> None:
    """Build the tab and connect its events."""
    choices = adapter_choices(studio, studio.config.bases[0])
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            adapter = gr.Dropdown(choices, label="Adapter", value=None)
            message = _build_properties(studio, blend, adapter)
        with gr.Column(scale=5, min_width=320):
            _build_notes(studio, adapter, message)
            _build_rename(studio, blend, adapter, message)
    plotted = _build_plots(studio, blend, choices)
    accordion, command = build_command_box()

    @with_messages
    def show_command(name: str | None, plotted: list[str] | None, base: str) -> str:
        return format_library_commands(studio, name or "", plotted or [], base)

    accordion.expand(show_command, [adapter, plotted, blend.base], command, **QUICK)


def _build_properties(studio: Studio, blend: BlendTab, adapter: gr.Dropdown) -> gr.Markdown:
    """Build the properties of an adapter, its verification and its conversion; returns the message."""
    properties = gr.Dataframe(
        headers=["Property", "Value"],
        datatype="str",
        column_count=2,
        label="Properties",
        wrap=True,
        elem_classes="wrapped-table",
    )
    verify = gr.Button("Verify")
    with gr.Group():
        dialect = gr.Dropdown(_FORMATS, value="kohya", label="Target format")
        convert = gr.Button("Convert")
    download = gr.DownloadButton("Download converted adapter", visible=False)
    message = gr.Markdown()

    @with_messages
    def show_properties(name: str | None) -> list[list[str]]:
        return [list(row) for row in inspect_rows(studio, name)] if name else []

    adapter.change(show_properties, adapter, properties, **QUICK)

    @with_messages
    def verify_selected(name: str | None, base: str) -> str:
        return f"```\n{verify_adapter(studio, name or '', base)}\n```"

    verify.click(verify_selected, [adapter, blend.base], message, **DEVICE)

    @with_messages
    def convert_selected(name: str | None, dialect: Any) -> tuple[Any, ...]:
        path, text = convert_adapter(studio, name or "", dialect)
        return html.escape(text), gr.update(value=str(path), visible=True)

    convert.click(convert_selected, [adapter, dialect], [message, download], **DEVICE)
    return message


def _build_notes(studio: Studio, adapter: gr.Dropdown, message: gr.Markdown) -> None:
    """Build the notes that are saved beside an adapter."""
    with gr.Group():
        with gr.Row():
            weight = gr.Number(1.0, label="Preferred weight", step=0.05, min_width=100)
            lowest = gr.Number(MIN_WEIGHT, label="Slider minimum", step=0.5, min_width=80)
            highest = gr.Number(MAX_WEIGHT, label="Slider maximum", step=0.5, min_width=80)
        trigger_words = gr.Textbox(label="Trigger words", info="Separated by commas; A1111's activation text")
        notes = gr.Textbox(label="Notes", lines=2)
        save = gr.Button("Save notes")

    @with_messages
    def show_notes(name: str | None) -> list[Any]:
        read = read_notes(studio, name) if name else AdapterNotes()
        return [read.preferred_weight, *read.weight_range, read.trigger_words, read.notes]

    fields = [weight, lowest, highest, trigger_words, notes]
    adapter.change(show_notes, adapter, fields, **QUICK)

    @with_messages
    def save_notes(
        name: str | None, weight: float, lowest: float, highest: float, trigger_words: str, notes: str
    ) -> str:
        edited = AdapterNotes(
            preferred_weight=float(weight or 0),
            weight_range=(float(lowest or 0), float(highest or 0)),
            trigger_words=trigger_words or "",
            notes=notes or "",
        )
        write_notes(studio, name or "", edited)
        return "Notes saved in the JSON file beside the adapter."

    save.click(save_notes, [adapter, *fields], message, **QUICK)


def _build_rename(studio: Studio, blend: BlendTab, adapter: gr.Dropdown, message: gr.Markdown) -> None:
    """Build the fields that rename an adapter and set its preview image."""
    with gr.Group():
        new_name = gr.Textbox(label="New adapter name")
        with gr.Row():
            rename = gr.Button("Rename adapter", min_width=120)
            preview = gr.Button("Use last image as preview", min_width=140)

    @with_messages
    def rename_selected(name: str | None, new_name: str, base: str) -> list[Any]:
        renamed = rename_adapter(studio, name or "", new_name)
        choices = adapter_choices(studio, base)
        text = f"Adapter renamed to {html.escape(renamed)}."
        return [gr.update(choices=choices, value=renamed), gr.update(choices=choices), text]

    rename.click(rename_selected, [adapter, new_name, blend.base], [adapter, blend.adapters, message], **QUICK)

    @with_messages
    def use_last_image(name: str | None, images: list[str]) -> str:
        if not images:
            raise gr.Error("there is no image yet; generate one on the Blend tab first", print_exception=False)
        set_preview(studio, name or "", Path(images[0]))
        return "The last image is now the preview of the adapter."

    preview.click(use_last_image, [adapter, blend.output.image_paths], message, **QUICK)


def _build_plots(studio: Studio, blend: BlendTab, choices: list[tuple[str, str]]) -> gr.Dropdown:
    """Build the plots of adapters; returns the choice of the adapters."""
    with gr.Row(equal_height=True):
        plotted = gr.Dropdown(
            choices, label="Adapters to plot", multiselect=True, max_choices=8, scale=3, min_width=220
        )
        plot = gr.Button("Plot spectra, norms and overlap", scale=1, min_width=160)
    plots = gr.Gallery(
        label="Plots",
        format="png",
        columns=2,
        height="auto",
        interactive=False,
        object_fit="contain",
        elem_classes="plots",
    )

    @with_messages
    def plot_adapters(names: list[str] | None, base: str) -> list[str]:
        return [str(path) for path in save_plots(studio, names or [], base)]

    plot.click(plot_adapters, [plotted, blend.base], plots, **DEVICE)
    return plotted
