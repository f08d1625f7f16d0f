"""The Train tab: pictures, captions, a run in its own process, and its adapter onto the shelf."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ui.studio import Studio
from ui.tabs.blend import Blend, choices
from ui.tabs.events import QUICK, command_box, spoken
from ui.training import PURPOSES, Job, State, Trainer

EVERY_S = 2.0


def draw_train(studio: Studio, blend: Blend) -> None:
    """Data on the left, the run on the right."""
    trainer = Trainer(studio)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                name = gr.Textbox(label="Name of the run", placeholder="my ink", min_width=140)
                purpose = gr.Radio(list(PURPOSES), value="style", label="What is learned", min_width=180)
            check = wire_data(trainer, name)
        with gr.Column(scale=5, min_width=320):
            job = [name, purpose, blend.base, *draw_job()]
            wire_run(studio, trainer, blend, name, job, check)


def wire_data(trainer: Trainer, name: gr.Textbox) -> gr.Button:
    """Pictures and their captions; returns the button that checks them."""
    files = gr.File(label="Pictures, and captions as .txt", file_count="multiple", height=130)
    captions = gr.Dataframe(
        headers=["picture", "caption"], datatype="str", column_count=2, interactive=True, label="Captions", wrap=True
    )
    thumbnails = gr.Gallery(label="Pictures to learn from", columns=6, height=180, interactive=False)
    with gr.Row():
        keep = gr.Button("Keep captions")
        check = gr.Button("Check the data")
    kept = gr.Markdown()

    @spoken
    def add(files: list[str] | None, name: str) -> tuple[Any, ...]:
        return table_of(trainer, name, trainer.add_pictures(name, [Path(file) for file in files or ()]))

    files.upload(add, [files, name], [captions, thumbnails], **QUICK)

    @spoken
    def write(name: str, rows: Any) -> str:
        trainer.write_captions(name, rows.values.tolist())
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
    return [trigger, instance, steps, extra]


def wire_run(
    studio: Studio, trainer: Trainer, blend: Blend, name: gr.Textbox, job: list[Any], check: gr.Button
) -> None:
    """Start, stop, watch, and put the adapter onto the shelf."""
    with gr.Row():
        start = gr.Button("Start training", variant="primary", min_width=120)
        stop = gr.Button("Stop training", variant="stop", min_width=120)
        publish = gr.Button("Put it on the shelf", min_width=120)
    said = gr.Markdown()
    state = gr.Markdown(elem_id="train-state")
    curve = gr.LinePlot(x="step", y="loss", label="Training loss", height=220)
    sheet = gr.Image(label="Samples on the way", format="png", interactive=False, elem_classes="picture", height=260)
    report = gr.DownloadButton("Report", visible=False)
    twin, command = command_box("The same run on the command line")
    timer = gr.Timer(EVERY_S, active=False)

    @spoken
    def look(*values: Any) -> str:
        return text_of(trainer.check(job_of(values)))

    check.click(look, job, said, **QUICK)

    @spoken
    def begin(*values: Any) -> tuple[Any, ...]:
        trainer.start(job_of(values))
        return "", gr.Timer(active=True)

    start.click(begin, job, [said, timer], **QUICK)

    @spoken
    def end() -> str:
        trainer.stop()
        return "stopping; its state is kept"

    stop.click(end, None, said, **QUICK)

    @spoken
    def watch(name: str) -> tuple[Any, ...]:
        return state_updates(trainer.state(name)) if name else (gr.skip(),) * 5

    timer.tick(watch, name, [state, curve, sheet, report, timer], **QUICK)

    @spoken
    def shelve(name: str, base: str) -> tuple[Any, ...]:
        done = html.escape(trainer.publish(name))
        return f"{done} is on the shelf; choose it on the Blend tab", gr.update(choices=choices(studio, base))

    publish.click(shelve, [name, blend.base], [said, blend.chosen], **QUICK)

    @spoken
    def as_command(*values: Any) -> str:
        return trainer.command(job_of(values))

    twin.expand(as_command, job, command, **QUICK)


def job_of(values: Sequence[Any]) -> Job:
    name, purpose, base, trigger, instance, steps, extra = values
    return Job(
        name=name or "",
        purpose=purpose,
        base=base,
        trigger=(trigger or "").strip(),
        instance=(instance or "").strip(),
        steps=int(steps or 0),
        extra=extra or "",
    )


def table_of(trainer: Trainer, name: str, rows: list[tuple[str, str]]) -> tuple[Any, ...]:
    """Captions and thumbnails of a run."""
    folder = trainer.folder(name) / "pictures"
    return [list(row) for row in rows], [(str(folder / picture), picture) for picture, _ in rows]


def text_of(lines: str) -> str:
    return "\n".join(f"- {html.escape(line)}" for line in lines.splitlines())


def state_updates(state: State) -> tuple[Any, ...]:
    """How a run stands, in the tab's components."""
    import pandas as pd

    steps, losses = [step for step, _ in state.losses], [loss for _, loss in state.losses]
    curve = pd.DataFrame({"step": steps, "loss": losses}, dtype=float)
    report = gr.update(value=str(state.report) if state.report else None, visible=state.report is not None)
    sheet = str(state.sheet) if state.sheet else None
    return html.escape(state.text), curve, sheet, report, gr.Timer(active=state.running)
