"""The Presets tab: blends that are kept, with thumbnails."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.presets import (
    SavedPreset,
    discard_preset,
    get_preset,
    import_preset,
    list_saved_presets,
    preset_commands,
    rename_preset,
    save_form,
)
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_gallery import card_gallery
from lora_diffusion_studio.tabs.blend.layout import BlendTab, form_from, form_updates
from lora_diffusion_studio.tabs.handlers import QUICK, command_box, with_messages
from lora_diffusion_studio.view_models.adapter_card import make_thumbnail


def draw_presets(studio: Studio, blend: BlendTab) -> list[Any]:
    """List on the left, what can be done on the right; returns what `list_updates` shows."""
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            gallery = card_gallery(preset_thumbnails(studio), label="Presets: click one", elem_classes="shelf tidy")
            chosen = gr.Dropdown(
                preset_names(studio), label="Preset", info="those marked (ready) come with the package"
            )
            about = gr.Markdown()
            said = gr.Markdown()
            twin, command = command_box("The same preset on the command line")
        with gr.Column(scale=2, min_width=300):
            load = gr.Button("Load onto the table", variant="primary")
            export = gr.DownloadButton("Export")
            shown = [chosen, gallery, about, export]
            wire_keeping(studio, blend, [*shown, said])
            wire_changes(studio, [*shown, said])

    @with_messages
    def look(name: str | None) -> list[Any]:
        return show_preset(get_preset(studio, name) if name else None)

    chosen.change(look, chosen, [about, export], **QUICK)

    def pick(data: gr.SelectData) -> str:
        return preset_names(studio)[int(data.index)]

    gallery.select(pick, None, chosen, **QUICK)

    @with_messages
    def put(name: str | None) -> list[Any]:
        form, notes = studio.form_from_preset(get_preset(studio, name or "").path)
        return [*form_updates(studio, form), html.escape("; ".join(notes) or "on the table: see the Blend tab")]

    load.click(put, chosen, [*blend.form_outputs, said], **QUICK)

    @with_messages
    def as_command(name: str | None) -> str:
        return preset_commands(studio, name or "")

    twin.expand(as_command, chosen, command, **QUICK)
    return [chosen, gallery]


def wire_keeping(studio: Studio, blend: BlendTab, shown: list[Any]) -> None:
    """A preset from the table, or from a file."""
    with gr.Group():
        name = gr.Textbox(label="Name of a preset to save or import", placeholder="Late neon")
        description = gr.Textbox(label="What it is good for")
        replace = gr.Checkbox(False, label="Replace one of that name")
        save = gr.Button("Save the table as a preset")
    imported = gr.File(label="Import a preset (.json)", file_types=[".json"], height=140)

    @with_messages
    def keep_form(name: str, description: str, replace: bool, kept: list[str], *values: Any) -> list[Any]:
        picture = Path(kept[0]) if kept else None
        done = save_form(studio, form_from(values), name, description, picture, replace=replace)
        return [*refresh_list(studio, done.name), f"saved as {html.escape(done.name)}"]

    save.click(keep_form, [name, description, replace, blend.stage.kept, *blend.form_inputs], shown, **QUICK)

    @with_messages
    def take(file: str | None, name: str) -> list[Any]:
        path = Path(file or "")
        return [*refresh_list(studio, import_preset(studio, path, name or path.stem).name), "imported"]

    imported.upload(take, [imported, name], shown, **QUICK)


def wire_changes(studio: Studio, shown: list[Any]) -> None:
    """Another name, or out of the list."""
    with gr.Group():
        new = gr.Textbox(label="New name")
        with gr.Row():
            renaming = gr.Button("Rename", min_width=90)
            remove = gr.Button("Remove", variant="stop", min_width=90)
    chosen = shown[0]

    @with_messages
    def rename_one(name: str | None, new: str) -> list[Any]:
        return [*refresh_list(studio, rename_preset(studio, name or "", new).name), "renamed"]

    renaming.click(rename_one, [chosen, new], shown, **QUICK)

    @with_messages
    def remove_one(name: str | None) -> list[Any]:
        discard_preset(studio, name or "")
        return [*refresh_list(studio, ""), "removed; its file is in the folder `discarded`"]

    remove.click(remove_one, chosen, shown, **QUICK)


def refresh_list(studio: Studio, name: str) -> list[Any]:
    """Update the list, with one preset chosen and shown."""
    found = [kept for kept in list_saved_presets(studio) if kept.name == name]
    chosen, gallery = list_updates(studio)
    return [{**chosen, "value": name or None}, gallery, *show_preset(found[0] if found else None)]


def list_updates(studio: Studio) -> list[Any]:
    """Return the current list, by name and as thumbnails."""
    return [gr.update(choices=preset_names(studio)), gr.update(value=preset_thumbnails(studio), selected_index=None)]


def preset_names(studio: Studio) -> list[str]:
    return [kept.name for kept in list_saved_presets(studio)]


def preset_thumbnails(studio: Studio) -> list[Any]:
    """Return thumbnails with names."""
    return [(make_thumbnail(kept.title, kept.thumbnail), kept.name) for kept in list_saved_presets(studio)]


def show_preset(kept: SavedPreset | None) -> list[Any]:
    """What is shown of a preset: text, and its file to export."""
    if kept is None:
        return ["", gr.update(value=None)]
    text = f"**{html.escape(kept.title)}**\n\n{html.escape(kept.problem or kept.about)}"
    return [text, gr.update(value=str(kept.path))]
