"""The Merge tab: the table as a checkpoint, or as one adapter."""

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
from lora_diffusion_studio.tabs.blend.layout import BlendTab, form_from
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, command_box, visitor_id, with_messages

KINDS = [("Checkpoint: folder", "folder"), ("Checkpoint: single file", "file"), ("One adapter", "adapter")]


def draw_merge(studio: Studio, blend: BlendTab) -> None:
    """What to write, what that would come to, and the writing."""
    gr.Markdown("Writes the adapters on the table into weights of their own. The base stays as it is.")
    with gr.Row():
        name = gr.Textbox(label="Name of the result", placeholder="gloop in neon", min_width=180)
        kind = gr.Dropdown(KINDS, value="folder", label="As", min_width=180)
        precision = gr.Dropdown(list(PRECISIONS), value="keep", label="Precision of a checkpoint", min_width=140)
        rank = gr.Slider(0, 128, 0, step=1, label="Rank of one adapter", info="0 is exact", min_width=160)
    with gr.Row():
        look = gr.Button("What would it do?")
        go = gr.Button("Merge", variant="primary", scale=2)
        stop = gr.Button("Stop merging", variant="stop", scale=1)
    said = gr.Markdown()
    download = gr.DownloadButton("Download", visible=False)
    twin, command = command_box("The same merge on the command line")
    inputs = [name, kind, precision, rank, *blend.form_inputs]

    def target_of(name: str, kind: str, precision: str, rank: float) -> MergeTarget:
        return MergeTarget(name=name, kind=kind, precision=precision, rank=int(rank))

    @with_messages
    def tell(name: str, kind: str, precision: str, rank: float, *values: Any) -> str:
        return html.escape(summarize_merge(studio, form_from(values), target_of(name, kind, precision, rank)))

    look.click(tell, inputs, said, **QUICK)

    @with_messages
    def write(
        request: gr.Request, name: str, kind: str, precision: str, rank: float, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        target = target_of(name, kind, precision, rank)
        for event in run_merge(studio, form_from(values), target, visitor_id(request)):
            if isinstance(event, MergeDone):
                file = str(event.path) if event.path.is_file() else None
                text = f"{html.escape(event.path.name)}: {html.escape(event.text)}"
                yield text, gr.update(value=file, visible=file is not None)
            else:
                yield event.text, gr.skip()

    go.click(write, inputs, [said, download], show_progress_on=[said], **DEVICE)

    def halt(request: gr.Request) -> None:
        studio.device.stop(visitor_id(request))

    stop.click(halt, None, None, **QUICK)

    @with_messages
    def as_command(name: str, kind: str, precision: str, rank: float, *values: Any) -> str:
        return format_merge_command(studio, form_from(values), target_of(name or "merged", kind, precision, rank))

    twin.expand(as_command, inputs, command, **QUICK)
