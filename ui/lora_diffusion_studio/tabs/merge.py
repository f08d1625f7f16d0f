"""The Merge tab: writes the current blend as a checkpoint or as a single adapter."""

# Gradio's events are untyped.
# pyright: standard

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.checkpoint_merge import (
    PRECISIONS,
    MergeDone,
    MergeTarget,
    format_merge_command,
    run_merge,
    summarize_merge,
)
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.form_values import read_form
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, build_command_box, session_id, with_messages

_OUTPUT_TYPES = [
    ("Checkpoint, diffusers folder", "folder"),
    ("Checkpoint, single file", "file"),
    ("One adapter", "adapter"),
]


def build_merge_tab(studio: Studio, blend: BlendTab) -> None:
    """Build the tab and connect its events."""
    gr.Markdown(
        "Merges the adapters of the Blend tab into a copy of the base model, or combines them into one adapter. "
        "The base model's files do not change."
    )
    with gr.Row():
        name = gr.Textbox(label="Output name", placeholder="gloop in neon", min_width=180)
        kind = gr.Dropdown(_OUTPUT_TYPES, value="folder", label="Output type", min_width=180)
        precisions = [("Same as base model" if name == "keep" else name, name) for name in PRECISIONS]
        precision = gr.Dropdown(precisions, value="keep", label="Checkpoint precision", min_width=140)
        rank = gr.Slider(0, 128, 0, step=1, label="Adapter rank", info="0 = exact sum", min_width=160)
    with gr.Row():
        preview = gr.Button("Preview merge")
        merge = gr.Button("Merge", variant="primary", scale=2)
        stop = gr.Button("Stop", variant="stop", scale=1)
    message = gr.Markdown()
    download = gr.DownloadButton("Download", visible=False)
    accordion, command = build_command_box()
    inputs = [name, kind, precision, rank, *blend.form_inputs]

    def read_target(name: str, kind: str, precision: str, rank: float) -> MergeTarget:
        return MergeTarget(name=name or "", kind=kind, precision=precision, rank=int(rank))

    @with_messages
    def show_summary(name: str, kind: str, precision: str, rank: float, *values: Any) -> str:
        return html.escape(summarize_merge(studio, read_form(values), read_target(name, kind, precision, rank)))

    preview.click(show_summary, inputs, message, **QUICK)

    @with_messages
    def merge_blend(
        request: gr.Request, name: str, kind: str, precision: str, rank: float, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        target = read_target(name, kind, precision, rank)
        for event in run_merge(studio, read_form(values), target, session_id(request)):
            if isinstance(event, MergeDone):
                file = str(event.path) if event.path.is_file() else None
                text = f"Saved {html.escape(event.path.name)}: {html.escape(event.text)}"
                yield text, gr.update(value=file, visible=file is not None)
            else:
                yield event.text, gr.skip()

    merge.click(merge_blend, inputs, [message, download], show_progress_on=[message], **DEVICE)

    def stop_merge(request: gr.Request) -> None:
        studio.device.stop(session_id(request))

    stop.click(stop_merge, None, None, **QUICK)

    @with_messages
    def show_command(name: str, kind: str, precision: str, rank: float, *values: Any) -> str:
        target = read_target(name or "merged", kind, precision, rank)
        return format_merge_command(studio, read_form(values), target)

    accordion.expand(show_command, inputs, command, **QUICK)
