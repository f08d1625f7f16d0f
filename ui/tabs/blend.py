"""The Blend tab's layout, and how its components stand for a form."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from lora_diffusion.config import Scheduler
from ui.forms import MODES, MOST, Form
from ui.rows import Row
from ui.studio import Studio
from ui.tabs.events import command_box
from ui.tabs.slots import FIELDS, SLOTS, Slot, draw_slot, rows_from, updates


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where pictures appear, and the buttons that make them."""

    seeds: gr.Radio
    live: gr.Checkbox
    go: gr.Button
    stop: gr.Button
    status: gr.Markdown
    picture: gr.Image
    slider: gr.ImageSlider
    gallery: gr.Gallery
    kept: gr.State
    """Paths of the visitor's pictures, newest first."""
    compare: gr.Button
    dropped: gr.File
    twin: gr.Accordion
    command: gr.Code


@dataclass(frozen=True, kw_only=True)
class Blend:
    """What other tabs need of this one."""

    base: gr.Dropdown
    chosen: gr.Dropdown
    slots: list[Slot]
    mode: gr.Dropdown
    switch_every: gr.Slider
    settings: dict[str, Any]
    """Components by the name of their setting."""
    stage: Stage

    @property
    def form_inputs(self) -> list[Any]:
        """All that a form is made of, in the order of `form_from`."""
        return [self.base, self.mode, self.switch_every, *self.settings.values(), *self.table_inputs]

    @property
    def table_inputs(self) -> list[Any]:
        """The fields of all places, in the order of `rows_from`."""
        return [slot.fields[name] for slot in self.slots for name in FIELDS]

    @property
    def form_outputs(self) -> list[Any]:
        """All that shows a form, in the order of `form_updates`."""
        return [
            self.base,
            self.chosen,
            self.mode,
            self.switch_every,
            *self.settings.values(),
            *slot_outputs(self.slots),
        ]


SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "scheduler", "width", "height", "count")


def slot_outputs(slots: Sequence[Slot]) -> list[Any]:
    return [part for slot in slots for part in (slot.group, slot.about, slot.trigger, *slot.fields.values())]


def form_from(values: Sequence[Any]) -> Form:
    """The form in the values of `Blend.form_inputs`."""
    base, mode, every, *rest = values
    given = dict(zip(SETTINGS, rest, strict=False))
    numbers = {name: int(given[name]) for name in ("seed", "steps", "width", "height", "count") if given[name]}
    settings = {"prompt": given["prompt"] or "", "seed": 0, **numbers, "guidance": given["guidance"]}
    settings |= {
        name: given[name] for name in ("negative_prompt", "scheduler") if given[name] not in (None, "", "base")
    }
    composition = {"switch_every": int(every)} if mode == "switch" else {}
    return Form(base=base, mode=mode, rows=rows_from(rest[len(SETTINGS) :]), settings=settings, composition=composition)


def form_updates(studio: Studio, form: Form) -> list[Any]:
    """What shows a form in `Blend.form_outputs`."""
    plain = {"prompt": "", "negative_prompt": "", "seed": 0, "steps": 20, "guidance": 4.0, "scheduler": "base"}
    plain |= {"width": 0, "height": 0, "count": 1}
    settings = [form.settings.get(name, plain[name]) for name in SETTINGS]
    base = form.base if form.base in studio.places.bases else studio.places.bases[0]
    chosen = gr.update(choices=choices(studio, base), value=[row.name for row in form.rows])
    every = gr.update(value=form.composition.get("switch_every", 5), visible=form.mode == "switch")
    return [base, chosen, form.mode, every, *settings, *updates(form.rows, about_in(studio))]


def choices(studio: Studio, base: str) -> list[tuple[str, str]]:
    """Adapters on offer, as shown and as named."""
    return [
        (f"{card.title} ({', '.join(card.triggers)})" if card.triggers else card.title, card.name)
        for card in studio.cards(base)
    ]


def about_in(studio: Studio) -> Any:
    """What is said of an adapter under its name, and its trigger words."""

    def about(row: Row) -> tuple[str, tuple[str, ...]]:
        card = studio.card(row.name)
        return html.escape(f"{card.about}; usual weight {card.preferred:g}"), card.triggers

    return about


def draw_blend(studio: Studio) -> Blend:
    """The tab's components, without their wiring."""
    base = studio.places.bases[0]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                base_box = gr.Dropdown(list(studio.places.bases), value=base, label="Base", scale=1, min_width=140)
                chosen = gr.Dropdown(
                    choices(studio, base),
                    label="Adapters",
                    multiselect=True,
                    max_choices=SLOTS,
                    scale=3,
                    min_width=220,
                    info="only those that fit the base; type to search names and trigger words",
                )
            slots = [draw_slot(number + 1, studio.block_presets(base)) for number in range(SLOTS)]
            with gr.Row():
                mode = gr.Dropdown([(text, key) for key, text in MODES.items()], value="sum", label="Together")
                every = gr.Slider(1, 20, 5, step=1, label="Steps before the next", visible=False)
            settings = draw_settings()
        with gr.Column(scale=6, min_width=320):
            stage = draw_stage()
    return Blend(
        base=base_box, chosen=chosen, slots=slots, mode=mode, switch_every=every, settings=settings, stage=stage
    )


def draw_settings() -> dict[str, Any]:
    """The prompt and what belongs to it."""
    prompt = gr.Textbox(
        label="Prompt",
        lines=3,
        elem_id="prompt",
        placeholder="a gloop character in the snow, in zwx style",
        info="(word:1.3) counts more, [word] less; Ctrl+Enter generates",
    )
    negative = gr.Textbox(label="Negative prompt", lines=1)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
        steps = gr.Slider(1, MOST["steps"], 20, step=1, label="Steps", min_width=140)
        guidance = gr.Slider(0, 15, 4, step=0.5, label="Guidance", min_width=140)
    with gr.Accordion("Size, count, scheduler", open=False), gr.Row():
        scheduler = gr.Dropdown(list(get_args(Scheduler)), value="base", label="Scheduler", min_width=120)
        width = gr.Number(0, label="Width", info="0: the base's", precision=0, minimum=0, step=8, min_width=90)
        height = gr.Number(0, label="Height", info="0: the base's", precision=0, minimum=0, step=8, min_width=90)
        count = gr.Slider(1, MOST["count"], 1, step=1, label="Count", min_width=120)
    return dict(zip(SETTINGS, (prompt, negative, seed, steps, guidance, scheduler, width, height, count), strict=True))


def draw_stage() -> Stage:
    """Buttons above, pictures below."""
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="generate", scale=2, min_width=120)
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
    with gr.Row():
        seeds = gr.Radio(["fixed", "random", "next"], value="fixed", label="Seed of the next picture", min_width=220)
        live = gr.Checkbox(False, label="Live: draw when a weight moves", min_width=160)
    status = gr.Markdown(elem_id="status")
    picture = gr.Image(
        label="Picture",
        format="png",
        interactive=False,
        height=460,
        buttons=["download", "fullscreen"],
        elem_classes="picture",
    )
    slider = gr.ImageSlider(label="The base alone, and the blend", format="png", interactive=False, visible=False)
    gallery = gr.Gallery(
        label="Pictures so far",
        format="png",
        columns=5,
        fit_columns=False,
        height=260,
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="picture",
    )
    with gr.Row():
        compare = gr.Button("Compare with the base", min_width=160)
        dropped = gr.File(label="Drop a picture to restore all its settings", file_types=[".png"], height=140)
    twin, command = command_box("The same on the command line")
    return Stage(
        seeds=seeds,
        live=live,
        go=go,
        stop=stop,
        status=status,
        picture=picture,
        slider=slider,
        gallery=gallery,
        kept=gr.State([]),
        compare=compare,
        dropped=dropped,
        twin=twin,
        command=command,
    )
