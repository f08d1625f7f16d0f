"""The Blend tab's layout, and how its components stand for a form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from lora_diffusion.config.generate import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS, Scheduler
from lora_diffusion.config.preset import MODE_OF, Composition
from lora_diffusion_studio.forms import MODES, MOST, SEEDS, BlendForm
from lora_diffusion_studio.studio import Studio
from lora_diffusion_studio.tabs.events import command_box
from lora_diffusion_studio.tabs.shelf import AdapterGallery, draw_gallery
from lora_diffusion_studio.tabs.slots import FIELDS, SLOTS, SlotComponents, draw_slot, parse_slots, slot_updates

COMPOSITION = (*MODE_OF, "parallel")


@dataclass(frozen=True, kw_only=True)
class OutputPanel:
    """The gallery, and the buttons that generate images."""

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
class BlendTab:
    """The components of the Blend tab that other tabs use."""

    base: gr.Dropdown
    adapter_gallery: AdapterGallery
    chosen: gr.Dropdown
    slots: list[SlotComponents]
    mode: gr.Dropdown
    composition: dict[str, Any]
    """Components by the name of their setting, such as `switch_every`."""
    settings: dict[str, Any]
    stage: OutputPanel

    @property
    def form_inputs(self) -> list[Any]:
        """All that a form is made of, in the order of `form_from`."""
        return [self.base, self.mode, *self.composition.values(), *self.settings.values(), *self.table_inputs]

    @property
    def table_inputs(self) -> list[Any]:
        """The fields of all slots, in the order of `parse_slots`."""
        return [slot.fields[name] for slot in self.slots for name in FIELDS]

    @property
    def table_outputs(self) -> list[Any]:
        """The components of all slots, in the order of `slot_updates`."""
        return [part for slot in self.slots for part in slot.outputs]

    @property
    def form_outputs(self) -> list[Any]:
        """All that shows a form, in the order of `form_updates`."""
        kept = [self.base, self.chosen, self.mode, *self.composition.values(), *self.settings.values()]
        return [*kept, *self.table_outputs]


PLAIN: dict[str, Any] = {
    "prompt": "",
    "negative_prompt": "",
    "seed": 0,
    "num_inference_steps": DEFAULT_NUM_INFERENCE_STEPS,
    "guidance_scale": DEFAULT_GUIDANCE_SCALE,
    "scheduler": "base",
    "width": 0,
    "height": 0,
    "count": 1,
    "variation": 0.0,
    "variation_seed": 0,
}
"""Settings with what they are if nobody has set them; a size of 0 is the base's."""
WHOLE = ("seed", "num_inference_steps", "width", "height", "count", "variation_seed", "switch_every")
"""Settings that are whole numbers; a browser's numbers are not."""


def form_from(values: Sequence[Any]) -> BlendForm:
    """The form in the values of `BlendTab.form_inputs`."""
    base, mode, *rest = values
    kept, rest = rest[: len(COMPOSITION)], rest[len(COMPOSITION) :]
    composition = {name: value for name, value in zip(COMPOSITION, kept, strict=True) if is_used(name, value, mode)}
    given = dict(zip(PLAIN, rest, strict=False))
    if not given["variation"]:
        given["variation_seed"] = 0
    used = {name: given[name] for name, plain in PLAIN.items() if given[name] not in (None, "", plain)}
    always = {"num_inference_steps": PLAIN["num_inference_steps"], "guidance_scale": given["guidance_scale"]}
    settings = {"prompt": "", "seed": 0, **always, **used}
    return BlendForm(
        base=base,
        mode=mode,
        rows=parse_slots(rest[len(PLAIN) :]),
        settings=round_whole_numbers(settings),
        composition=round_whole_numbers(composition),
    )


def is_used(name: str, value: object, mode: str) -> bool:
    """Whether a setting of the composition says something in that mode."""
    return bool(value) if name == "parallel" else MODE_OF[name] == mode and value is not None


def round_whole_numbers(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: int(value) if name in WHOLE else value for name, value in settings.items()}


def form_updates(studio: Studio, form: BlendForm) -> list[Any]:
    """What shows a form in `BlendTab.form_outputs`."""
    base = form.base if form.base in studio.places.bases else studio.places.bases[0]
    chosen = gr.update(choices=list_choices(studio, base), value=[row.name for row in form.rows])
    composition = mode_updates(form.mode, form.composition)
    settings = [form.settings.get(name, plain) for name, plain in PLAIN.items()]
    return [base, chosen, form.mode, *composition, *settings, *slot_updates(form.rows, studio.card)]


def mode_updates(mode: str, given: Mapping[str, Any]) -> list[Any]:
    """What shows the settings of a mode, and those of others not."""
    plain = {name: Composition.model_fields[name].default for name in COMPOSITION}
    return [
        gr.update(value=given.get(name, plain[name]), visible=MODE_OF.get(name, mode) == mode) for name in COMPOSITION
    ]


def list_choices(studio: Studio, base: str) -> list[tuple[str, str]]:
    """Adapters on offer, as shown and as named."""
    return [
        (f"{card.title} ({', '.join(card.triggers)})" if card.triggers else card.title, card.name)
        for card in studio.cards(base)
    ]


def draw_blend(studio: Studio) -> BlendTab:
    """The tab's components, without their wiring."""
    base = studio.places.bases[0]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                base_box = gr.Dropdown(list(studio.places.bases), value=base, label="Base", scale=1, min_width=140)
                chosen = gr.Dropdown(
                    list_choices(studio, base),
                    label="Adapters",
                    multiselect=True,
                    max_choices=SLOTS,
                    scale=3,
                    min_width=220,
                    info="on the table; only those that fit the base are offered",
                )
            adapter_gallery = draw_gallery(studio)
            slots = [draw_slot(number + 1, studio.block_presets(base)) for number in range(SLOTS)]
            mode, composition = draw_composition()
            numbers, seeds = draw_numbers()
        with gr.Column(scale=6, min_width=320):
            prompts = draw_prompts()
            stage = draw_stage(seeds)
    return BlendTab(
        base=base_box,
        adapter_gallery=adapter_gallery,
        chosen=chosen,
        slots=slots,
        mode=mode,
        composition=composition,
        settings={**prompts, **numbers},
        stage=stage,
    )


def draw_composition() -> tuple[gr.Dropdown, dict[str, Any]]:
    """How the adapters come together, and what each way has of its own."""
    with gr.Row():
        mode = gr.Dropdown(
            [(text, key) for key, text in MODES.items()],
            value="sum",
            label="Together",
            info="routed mixtures come with their presets",
            min_width=200,
        )
        parts = (
            gr.Slider(1, 20, 5, step=1, label="Steps before the next", visible=False, min_width=140),
            gr.Slider(0, 4, 1.5, step=0.1, label="The second grows by", visible=False, min_width=140),
            gr.Slider(0, 4, 0.5, step=0.1, label="The second begins at", visible=False, min_width=140),
            gr.Slider(0, 20, 1, step=0.5, label="How much is taken out", visible=False, min_width=140),
            gr.Checkbox(False, label="Exact: beside the weights, for half precision", min_width=140),
        )
    return mode, dict(zip(COMPOSITION, parts, strict=True))


def draw_prompts() -> dict[str, Any]:
    """What the picture shows, and what not."""
    prompt = gr.Textbox(
        label="Prompt",
        lines=2,
        elem_id="prompt",
        placeholder="a gloop character in the snow, in zwx style",
        info="(word:1.3) counts more, [word] less; Ctrl+Enter generates",
    )
    return {"prompt": prompt, "negative_prompt": gr.Textbox(label="Negative prompt", lines=1)}


def draw_numbers() -> tuple[dict[str, Any], gr.Radio]:
    """All other settings, and what the next picture's seeds are."""
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
        steps = gr.Slider(
            1, MOST["num_inference_steps"], DEFAULT_NUM_INFERENCE_STEPS, step=1, label="Steps", min_width=140
        )
        guidance = gr.Slider(0, 15, DEFAULT_GUIDANCE_SCALE, step=0.5, label="Guidance", min_width=140)
    seeds = gr.Radio(list(SEEDS), value="fixed", label="Seed of the next picture")
    with gr.Accordion("Size, count, scheduler, variation", open=False), gr.Row():
        scheduler = gr.Dropdown(list(get_args(Scheduler)), value="base", label="Scheduler", min_width=120)
        width = gr.Number(0, label="Width", info="0: the base's", precision=0, minimum=0, step=8, min_width=90)
        height = gr.Number(0, label="Height", info="0: the base's", precision=0, minimum=0, step=8, min_width=90)
        count = gr.Slider(1, MOST["count"], 1, step=1, label="Count", min_width=120)
        variation = gr.Slider(0, 1, 0, step=0.05, label="Variation", info="from the seed's picture", min_width=140)
        variation_seed = gr.Number(0, label="Seed of the variation", precision=0, minimum=0, min_width=90)
    parts = (seed, steps, guidance, scheduler, width, height, count, variation, variation_seed)
    return dict(zip(list(PLAIN)[2:], parts, strict=True)), seeds


def draw_stage(seeds: gr.Radio) -> OutputPanel:
    """Buttons above, pictures below."""
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="generate", scale=2, min_width=120)
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        live = gr.Checkbox(False, label="Live: draw when a weight moves", scale=1, min_width=160)
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
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="picture tidy",
    )
    with gr.Row():
        compare = gr.Button("Compare with the base", min_width=160)
        dropped = gr.File(label="Drop a picture to restore all its settings", file_types=[".png"], height=140)
    twin, command = command_box("The same on the command line")
    return OutputPanel(
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
