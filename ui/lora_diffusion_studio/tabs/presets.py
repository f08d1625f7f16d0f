"""The Presets tab: lists, loads, saves, imports, exports, renames and deletes presets."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.presets import (
    PresetFile,
    delete_preset,
    format_preset_commands,
    get_preset,
    import_preset,
    list_saved_presets,
    rename_preset,
    save_preset,
)
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_gallery import build_thumbnail_gallery
from lora_diffusion_studio.tabs.blend.form_values import form_updates, read_form
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import QUICK, build_command_box, with_messages
from lora_diffusion_studio.view_models.thumbnails import make_thumbnail


def build_presets_tab(studio: Studio, blend: BlendTab) -> list[Any]:
    """Build the tab and connect its events; returns the components that `list_updates` changes."""
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            gallery = build_thumbnail_gallery(_thumbnails(studio), label="Presets", show_label=False)
            selected = gr.Dropdown(
                _names(studio), label="Preset", info="Built-in presets can be loaded, but not changed"
            )
            summary = gr.Markdown()
            message = gr.Markdown()
            accordion, command = build_command_box()
        with gr.Column(scale=2, min_width=300):
            load = gr.Button("Load preset", variant="primary")
            export = gr.DownloadButton("Export preset")
            outputs = [selected, gallery, summary, export, message]
            _build_save(studio, blend, outputs)
            _build_changes(studio, outputs)

    @with_messages
    def show(name: str | None) -> list[Any]:
        return _preset_updates(get_preset(studio, name) if name else None)

    selected.change(show, selected, [summary, export], **QUICK)

    def click_thumbnail(data: gr.SelectData) -> str:
        return _names(studio)[int(data.index)]

    gallery.select(click_thumbnail, None, selected, **QUICK)

    @with_messages
    def load_preset(name: str | None) -> list[Any]:
        form, notes = studio.form_from_preset(get_preset(studio, name or "").path)
        text = "Preset loaded into the Blend tab." + "".join(f" Note: {html.escape(note)}." for note in notes)
        return [*form_updates(studio, form), text]

    load.click(load_preset, selected, [*blend.form_outputs, message], **QUICK)

    @with_messages
    def show_command(name: str | None) -> str:
        return format_preset_commands(studio, name or "")

    accordion.expand(show_command, selected, command, **QUICK)
    return [selected, gallery]


def _build_save(studio: Studio, blend: BlendTab, outputs: list[Any]) -> None:
    """Build the fields that save the current blend, and the import of a file."""
    with gr.Group():
        name = gr.Textbox(label="Preset name", placeholder="Late neon", info="For saving or importing")
        description = gr.Textbox(label="Description", placeholder="What the preset is good for")
        overwrite = gr.Checkbox(False, label="Overwrite a preset of the same name")
        save = gr.Button("Save current blend as preset")
    file = gr.File(label="Import preset (.json)", file_types=[".json"], height=140)

    @with_messages
    def save_blend(name: str, description: str, overwrite: bool, images: list[str], *values: Any) -> list[Any]:
        image = Path(images[0]) if images else None
        saved = save_preset(studio, read_form(values), name, description, image, overwrite=overwrite)
        return [*_refresh(studio, saved.name), f"Preset saved as {html.escape(saved.name)}."]

    inputs = [name, description, overwrite, blend.output.image_paths, *blend.form_inputs]
    save.click(save_blend, inputs, outputs, **QUICK)

    @with_messages
    def import_file(file: str | None, name: str) -> list[Any]:
        path = Path(file or "")
        imported = import_preset(studio, path, name or path.stem)
        return [*_refresh(studio, imported.name), f"Preset imported as {html.escape(imported.name)}."]

    file.upload(import_file, [file, name], outputs, **QUICK)


def _build_changes(studio: Studio, outputs: list[Any]) -> None:
    """Build the fields that rename and delete the selected preset."""
    with gr.Group():
        new_name = gr.Textbox(label="New name")
        with gr.Row():
            rename = gr.Button("Rename", min_width=90)
            delete = gr.Button("Delete", variant="stop", min_width=90)
    selected = outputs[0]

    @with_messages
    def rename_selected(name: str | None, new_name: str) -> list[Any]:
        renamed = rename_preset(studio, name or "", new_name).name
        return [*_refresh(studio, renamed), f"Preset renamed to {html.escape(renamed)}."]

    rename.click(rename_selected, [selected, new_name], outputs, **QUICK)

    @with_messages
    def delete_selected(name: str | None) -> list[Any]:
        delete_preset(studio, name or "")
        return [*_refresh(studio, ""), "Preset moved to the folder `deleted presets`."]

    delete.click(delete_selected, selected, outputs, **QUICK)


def list_updates(studio: Studio) -> list[Any]:
    """Return the updates of the dropdown and the gallery that show the current presets."""
    return [gr.update(choices=_names(studio)), gr.update(value=_thumbnails(studio), selected_index=None)]


def _refresh(studio: Studio, name: str) -> list[Any]:
    """Return the updates that show the current presets, with one of them selected."""
    preset = next((preset for preset in list_saved_presets(studio) if preset.name == name), None)
    selected, gallery = list_updates(studio)
    return [{**selected, "value": name or None}, gallery, *_preset_updates(preset)]


def _names(studio: Studio) -> list[str]:
    return [preset.name for preset in list_saved_presets(studio)]


def _thumbnails(studio: Studio) -> list[Any]:
    return [(make_thumbnail(preset.title, preset.thumbnail), preset.path.stem) for preset in list_saved_presets(studio)]


def _preset_updates(preset: PresetFile | None) -> list[Any]:
    """Return the updates of the summary and of the export button."""
    if preset is None:
        return ["", gr.update(value=None)]
    text = f"**{html.escape(preset.title)}**\n\n{html.escape(preset.problem or preset.summary)}"
    return [text, gr.update(value=str(preset.path))]
