"""The Train tab: pictures, captions, a run in its own process, and adding its adapter to the library."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.backend.training_runs import PURPOSES, Job, RunManager, RunStatus
from lora_diffusion_studio.tabs.blend.layout import BlendTab, list_choices
from lora_diffusion_studio.tabs.handlers import QUICK, command_box, with_messages

EVERY_S = 2.0


def draw_train(studio: Studio, blend: BlendTab) -> None:
    """Data on the left, the run on the right."""
    trainer = RunManager(studio)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                name = gr.Textbox(
                    label="Name of the run", placeholder="my ink", info="Enter shows one that is there", min_width=140
                )
                purpose = gr.Radio(list(PURPOSES), value="style", label="What is learned", min_width=180)
            check = wire_data(trainer, name)
        with gr.Column(scale=5, min_width=320):
            job = [name, purpose, blend.base, *draw_job()]
            wire_run(studio, trainer, blend, name, job, check)


def wire_data(trainer: RunManager, name: gr.Textbox) -> gr.Button:
    """Pictures and their captions; returns the button that checks them."""
    files = gr.File(label="Pictures, and captions as .txt", file_count="multiple", height=130)
    captions = gr.Dataframe(
        headers=["", "picture", "caption"],
        datatype=["html", "str", "str"],
        column_count=3,
        column_widths=["80px", "90px", "330px"],
        static_columns=[0, 1],
        interactive=True,
        label="Captions",
        wrap=True,
        elem_classes="facts",
    )
    with gr.Row():
        keep = gr.Button("Keep captions")
        check = gr.Button("Check the data")
    kept = gr.Markdown()

    @with_messages
    def add(files: list[str] | None, name: str) -> list[list[str]]:
        return captions_table(trainer, name, trainer.add_pictures(name, [Path(file) for file in files or ()]))

    files.upload(add, [files, name], captions, **QUICK)

    @with_messages
    def look(name: str) -> list[list[str]]:
        return captions_table(trainer, name, trainer.captions(name)) if name else []

    name.submit(look, name, captions, **QUICK)

    @with_messages
    def write(name: str, rows: Any) -> str:
        trainer.write_captions(name, [row[1:] for row in rows.values.tolist()])
        return "captions kept"

    keep.click(write, [name, captions], kept, **QUICK)
    return check


def draw_job() -> list[Any]:
    """What else a run is told, in the order of `Job`."""
    with gr.Row():
        trigger = gr.Textbox(label="Trigger word", placeholder="sks", info="for a style", min_width=140)
        instance = gr.Textbox(label="Instance prompt", placeholder="photo of sks dog", info="for a subject")
        steps = gr.Number(0, label="Training steps", info="0: the default", precision=0, minimum=0, min_width=100)
    with gr.Accordion("Expert settings", open=False):
        extra = gr.Textbox(label="Settings", lines=3, placeholder="validation.share=0.1\nadapter.rank=16")
        prompts = gr.Textbox(label="Prompts of the samples", lines=2, info="a line each; the first caption if empty")
    return [trigger, instance, steps, extra, prompts]


def wire_run(
    studio: Studio, trainer: RunManager, blend: BlendTab, name: gr.Textbox, job: list[Any], check: gr.Button
) -> None:
    """Start, stop, watch, and add the adapter to the library."""
    with gr.Row():
        start = gr.Button("Start training", variant="primary", min_width=120)
        stop = gr.Button("Stop training", variant="stop", min_width=120)
        publish = gr.Button("Put it on the shelf", min_width=120)
    said = gr.Markdown()
    state = gr.Markdown(elem_id="train-state")
    curve = gr.LinePlot(x="step", y="loss", label="Training loss", height=280)
    sheet = gr.Image(label="Samples on the way", format="png", interactive=False, elem_classes="picture", height=440)
    report = gr.DownloadButton("Report", visible=False)
    twin, command = command_box("The same run on the command line")
    timer = gr.Timer(EVERY_S, active=False)

    @with_messages
    def look(*values: Any) -> str:
        return join_lines(trainer.check(parse_job(values)))

    check.click(look, job, said, **QUICK)

    @with_messages
    def begin(*values: Any) -> tuple[Any, ...]:
        trainer.start(parse_job(values))
        return "", gr.Timer(active=True)

    start.click(begin, job, [said, timer], **QUICK)

    @with_messages
    def end() -> str:
        trainer.stop()
        return "stopping; its state is kept"

    stop.click(end, None, said, **QUICK)

    @with_messages
    def watch(name: str) -> tuple[Any, ...]:
        return status_updates(trainer.state(name)) if name else (gr.skip(),) * 5

    shown = [state, curve, sheet, report, timer]
    gr.on([timer.tick, name.submit], watch, name, shown, **QUICK)

    @with_messages
    def shelve(name: str, base: str) -> tuple[Any, ...]:
        done = html.escape(trainer.publish(name))
        return f"{done} is on the shelf; choose it on the Blend tab", gr.update(choices=list_choices(studio, base))

    publish.click(shelve, [name, blend.base], [said, blend.chosen], **QUICK)

    @with_messages
    def as_command(*values: Any) -> str:
        return trainer.command(parse_job(values))

    twin.expand(as_command, job, command, **QUICK)


def parse_job(values: Sequence[Any]) -> Job:
    name, purpose, base, trigger, instance, steps, extra, prompts = values
    return Job(
        name=name or "",
        purpose=purpose,
        base=base,
        trigger=(trigger or "").strip(),
        instance=(instance or "").strip(),
        steps=int(steps or 0),
        extra=extra or "",
        prompts=prompts or "",
    )


def captions_table(trainer: RunManager, name: str, rows: list[tuple[str, str]]) -> list[list[str]]:
    """Return pictures with their captions, as the table shows them."""
    return [
        [f'<img src="{trainer.thumbnail(name, picture)}" alt="{html.escape(picture)}">', picture, caption]
        for picture, caption in rows
    ]


def join_lines(lines: str) -> str:
    return "\n".join(f"- {html.escape(line)}" for line in lines.splitlines())


def status_updates(state: RunStatus) -> tuple[Any, ...]:
    """Return the updates that show the status of a run."""
    import pandas as pd

    steps, losses = [step for step, _ in state.losses], [loss for _, loss in state.losses]
    curve = pd.DataFrame({"step": steps, "loss": losses}, dtype=float)
    report = gr.update(value=str(state.report) if state.report else None, visible=state.report is not None)
    sheet = str(state.sheet) if state.sheet else None
    return html.escape(state.text), curve, sheet, report, gr.Timer(active=state.running)
