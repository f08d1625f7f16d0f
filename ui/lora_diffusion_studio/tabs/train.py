"""The Train tab: uploads and captions images, starts and watches a run, and adds its adapter to the library."""

# Gradio's events are untyped.
# pyright: standard

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion.core.templates import render_template
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.backend.training_runs import PURPOSES, RunStatus, TrainingJob, TrainingRuns
from lora_diffusion_studio.tabs.blend.adapter_gallery import adapter_choices
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import QUICK, build_command_box, with_messages

_PACKAGE = "lora_diffusion_studio.tabs"
_REFRESH_S = 2.0
_PURPOSE_LABELS = {"style": "Style", "dreambooth": "Subject (DreamBooth)"}


def build_train_tab(studio: Studio, blend: BlendTab) -> None:
    """Build the tab, with the data on the left and the run on the right, and connect its events."""
    runs = TrainingRuns(studio)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                name = gr.Textbox(
                    label="Run name", placeholder="my ink", info="Press Enter to open an existing run", min_width=140
                )
                choices = [(_PURPOSE_LABELS[purpose], purpose) for purpose in PURPOSES]
                purpose = gr.Radio(choices, value=PURPOSES[0], label="Training type", min_width=180)
            check = _build_dataset(runs, name)
        with gr.Column(scale=5, min_width=320):
            job = [name, purpose, blend.base, *_build_settings()]
            _build_run(studio, runs, blend, job, check)


def _build_dataset(runs: TrainingRuns, name: gr.Textbox) -> gr.Button:
    """Build the upload and the captions; returns the button that checks them."""
    files = gr.File(label="Images, with captions as .txt files", file_count="multiple", height=130)
    captions = gr.Dataframe(
        headers=["", "Image", "Caption"],
        datatype=["html", "str", "str"],
        column_count=3,
        column_widths=["80px", "90px", "330px"],
        static_columns=[0, 1],
        interactive=True,
        label="Captions",
        wrap=True,
        elem_classes="wrapped-table",
    )
    with gr.Row():
        save = gr.Button("Save captions")
        check = gr.Button("Check dataset")
    message = gr.Markdown()

    @with_messages
    def add_files(files: list[str] | None, name: str) -> list[list[str]]:
        return _caption_rows(runs, name, runs.add_files(name, [Path(file) for file in files or ()]))

    files.upload(add_files, [files, name], captions, **QUICK)

    @with_messages
    def open_run(name: str) -> list[list[str]]:
        return _caption_rows(runs, name, runs.read_captions(name)) if name else []

    name.submit(open_run, name, captions, **QUICK)

    @with_messages
    def save_captions(name: str, rows: Any) -> str:
        runs.write_captions(name, [row[1:] for row in rows.values.tolist()])
        return "Captions saved."

    save.click(save_captions, [name, captions], message, **QUICK)
    return check


def _build_settings() -> list[Any]:
    """Build the settings of a run, in the order of `_parse_job`."""
    with gr.Row():
        trigger_word = gr.Textbox(label="Trigger word", placeholder="sks", info="For a style", min_width=140)
        instance_prompt = gr.Textbox(label="Instance prompt", placeholder="photo of sks dog", info="For a subject")
        steps = gr.Number(0, label="Training steps", info="0 = default", precision=0, minimum=0, min_width=100)
    with gr.Accordion("Advanced settings", open=False):
        settings = gr.Textbox(
            label="Other settings",
            lines=3,
            placeholder="validation.share=0.1\nadapter.rank=16",
            info="One section.key=value per line, as for --set",
        )
        sample_prompts = gr.Textbox(
            label="Sample prompts", lines=2, info="One per line. Default: the instance prompt or the first caption"
        )
    return [trigger_word, instance_prompt, steps, settings, sample_prompts]


def _build_run(studio: Studio, runs: TrainingRuns, blend: BlendTab, job: list[Any], check: gr.Button) -> None:
    """Build the buttons and the status of a run, and connect them."""
    name = job[0]
    with gr.Row():
        start = gr.Button("Start training", variant="primary", min_width=120)
        stop = gr.Button("Stop training", variant="stop", min_width=120)
        add = gr.Button("Add to library", min_width=120)
    message = gr.Markdown()
    status = gr.Markdown(elem_id="training-status")
    losses = gr.LinePlot(x="step", y="loss", x_title="Step", y_title="Loss", label="Training loss", height=280)
    samples = gr.Image(label="Samples", format="png", interactive=False, elem_classes="fit-image", height=440)
    report = gr.DownloadButton("Download report", visible=False)
    accordion, command = build_command_box()
    timer = gr.Timer(_REFRESH_S, active=False)

    @with_messages
    def check_dataset(*values: Any) -> str:
        return _as_list(runs.check_dataset(_parse_job(values)))

    check.click(check_dataset, job, message, **QUICK)

    @with_messages
    def start_run(*values: Any) -> tuple[Any, ...]:
        runs.start(_parse_job(values))
        return "", gr.Timer(active=True)

    start.click(start_run, job, [message, timer], **QUICK)

    @with_messages
    def stop_run() -> str:
        runs.stop()
        return "Stopping. The state is saved; Start training resumes the run."

    stop.click(stop_run, None, message, **QUICK)

    @with_messages
    def refresh(name: str) -> tuple[Any, ...]:
        return _status_updates(runs.get_status(name)) if name else (gr.skip(),) * 5

    gr.on([timer.tick, name.submit], refresh, name, [status, losses, samples, report, timer], **QUICK)

    @with_messages
    def add_to_library(name: str, base: str) -> tuple[Any, ...]:
        added = html.escape(runs.add_to_library(name))
        choices = gr.update(choices=adapter_choices(studio, base))
        return f"Added {added} to the library. Select it on the Blend tab.", choices

    add.click(add_to_library, [name, blend.base], [message, blend.adapters], **QUICK)

    @with_messages
    def show_command(*values: Any) -> str:
        return runs.format_command(_parse_job(values))

    accordion.expand(show_command, job, command, **QUICK)


def _parse_job(values: Sequence[Any]) -> TrainingJob:
    name, purpose, base, trigger_word, instance_prompt, steps, settings, sample_prompts = values
    return TrainingJob(
        name=name or "",
        purpose=purpose,
        base=base,
        trigger_word=(trigger_word or "").strip(),
        instance_prompt=(instance_prompt or "").strip(),
        steps=int(steps or 0),
        settings=settings or "",
        sample_prompts=sample_prompts or "",
    )


def _caption_rows(runs: TrainingRuns, name: str, captions: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the rows of the caption table: thumbnail, file name and caption."""
    return [
        [
            render_template(_PACKAGE, "caption_image.html.j2", url=runs.thumbnail_url(name, image), name=image),
            image,
            caption,
        ]
        for image, caption in captions
    ]


def _as_list(text: str) -> str:
    """Return lines of text as a Markdown list."""
    return "\n".join(f"- {html.escape(line)}" for line in text.splitlines())


def _status_updates(status: RunStatus) -> tuple[Any, ...]:
    """Return the updates of the status, the plot, the samples, the report and the timer."""
    import pandas as pd

    steps, losses = [step for step, _ in status.losses], [loss for _, loss in status.losses]
    plot = pd.DataFrame({"step": steps, "loss": losses}, dtype=float)
    report = gr.update(value=str(status.report) if status.report else None, visible=status.report is not None)
    samples = str(status.sample_sheet) if status.sample_sheet else None
    return html.escape(status.text), plot, samples, report, gr.Timer(active=status.running)
