"""The components of the Blend tab."""

from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from lora_diffusion.config.generate import Scheduler
from lora_diffusion.config.preset import Composition, Mode
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_gallery import AdapterGallery, adapter_choices, build_adapter_gallery
from lora_diffusion_studio.tabs.blend.adapter_slots import NUM_SLOTS, SLOT_FIELDS, SlotComponents, build_slot
from lora_diffusion_studio.tabs.blend.form_values import COMPOSITION_SETTINGS, DEFAULT_SETTINGS
from lora_diffusion_studio.tabs.handlers import build_command_box
from lora_diffusion_studio.view_models.blend_form import MAX_SETTINGS, SEED_MODES

_MODE_LABELS: dict[Mode, str] = {
    "sum": "Sum: all adapters at once",
    "switch": "Switch: one adapter at a time",
    "composite": "Composite: mean of the predictions",
    "k-lora": "K-LoRA: the stronger of two, per layer",
    "np-lora": "NP-LoRA: first adapter, minus the others' directions",
}


@dataclass(frozen=True, kw_only=True)
class OutputPanel:
    """The buttons, the status and the images."""

    seed_mode: gr.Radio
    live: gr.Checkbox
    generate: gr.Button
    stop: gr.Button
    status: gr.Markdown
    image: gr.Image
    comparison: gr.ImageSlider
    gallery: gr.Gallery
    image_paths: gr.State
    """Paths of the session's images, newest first."""
    compare: gr.Button
    image_file: gr.File
    """Upload of an image whose settings are loaded."""
    command_accordion: gr.Accordion
    command: gr.Code


@dataclass(frozen=True, kw_only=True)
class BlendTab:
    """The components of the Blend tab that other tabs and events use."""

    base: gr.Dropdown
    adapter_gallery: AdapterGallery
    adapters: gr.Dropdown
    """The selected adapters."""
    slots: list[SlotComponents]
    mode: gr.Dropdown
    composition: dict[str, Any]
    """Components by their name in `COMPOSITION_SETTINGS`."""
    settings: dict[str, Any]
    """Components by their name in `DEFAULT_SETTINGS`."""
    output: OutputPanel

    @property
    def form_inputs(self) -> list[Any]:
        """The components whose values make a form, in the order of `read_form`."""
        return [self.base, self.mode, *self.composition.values(), *self.settings.values(), *self.slot_inputs]

    @property
    def slot_inputs(self) -> list[Any]:
        """The input components of all slots, in the order of `parse_slots`."""
        return [slot.fields[name] for slot in self.slots for name in SLOT_FIELDS]

    @property
    def slot_outputs(self) -> list[Any]:
        """The components of all slots, in the order of `slot_updates`."""
        return [component for slot in self.slots for component in slot.outputs]

    @property
    def form_outputs(self) -> list[Any]:
        """The components that show a form, in the order of `form_updates`."""
        settings = [self.base, self.adapters, self.mode, *self.composition.values(), *self.settings.values()]
        return [*settings, *self.slot_outputs]


def build_blend_tab(studio: Studio) -> BlendTab:
    """Build the components of the tab, without their events."""
    base = studio.config.bases[0]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                base_dropdown = gr.Dropdown(
                    list(studio.config.bases), value=base, label="Base model", scale=1, min_width=140
                )
                adapters = gr.Dropdown(
                    adapter_choices(studio, base),
                    label="Adapters",
                    multiselect=True,
                    max_choices=NUM_SLOTS,
                    scale=3,
                    min_width=220,
                    info="Adapters that fit the base model",
                )
            adapter_gallery = build_adapter_gallery(studio)
            block_presets = studio.list_block_presets(base)
            slots = [build_slot(number + 1, block_presets) for number in range(NUM_SLOTS)]
            mode, composition = _build_composition()
            numbers, seed_mode = _build_numbers()
        with gr.Column(scale=6, min_width=320):
            prompts = _build_prompts()
            output = _build_output(seed_mode)
    return BlendTab(
        base=base_dropdown,
        adapter_gallery=adapter_gallery,
        adapters=adapters,
        slots=slots,
        mode=mode,
        composition=composition,
        settings={**prompts, **numbers},
        output=output,
    )


def _build_composition() -> tuple[gr.Dropdown, dict[str, Any]]:
    """Build the blend mode and the settings of each mode."""
    default = Composition()
    with gr.Row():
        mode = gr.Dropdown(
            [(_MODE_LABELS[mode], mode) for mode in get_args(Mode)],
            value=default.mode,
            label="Blend mode",
            info="How the adapters are combined",
            min_width=200,
        )
        components = (
            gr.Slider(1, 20, default.switch_every, step=1, label="Steps per adapter", visible=False, min_width=140),
            gr.Slider(0, 4, default.k_lora_slope, step=0.1, label="Slope", visible=False, min_width=140),
            gr.Slider(0, 4, default.k_lora_start, step=0.1, label="Start", visible=False, min_width=140),
            gr.Slider(
                0, 20, default.projection_strength, step=0.5, label="Projection strength", visible=False, min_width=140
            ),
            gr.Checkbox(
                default.parallel,
                label="Apply in parallel to the weights",
                info="More exact in half precision, but slower",
                min_width=140,
            ),
        )
    return mode, dict(zip(COMPOSITION_SETTINGS, components, strict=True))


def _build_prompts() -> dict[str, Any]:
    prompt = gr.Textbox(
        label="Prompt",
        lines=2,
        elem_id="prompt",
        placeholder="a gloop character in the snow, in zwx style",
        info="(word:1.3) raises the attention to a word, [word] lowers it. Ctrl+Enter generates.",
    )
    return {"prompt": prompt, "negative_prompt": gr.Textbox(label="Negative prompt", lines=1)}


def _build_numbers() -> tuple[dict[str, Any], gr.Radio]:
    """Build the other settings, and how the next seed is chosen."""
    default = DEFAULT_SETTINGS
    with gr.Row():
        steps = gr.Slider(
            1, MAX_SETTINGS["num_inference_steps"], default["num_inference_steps"], step=1, label="Steps", min_width=160
        )
        guidance = gr.Slider(0, 15, default["guidance_scale"], step=0.5, label="Guidance scale (CFG)", min_width=240)
    with gr.Row():
        seed = gr.Number(default["seed"], label="Seed", precision=0, minimum=0, scale=1, min_width=90)
        seed_choices = [(mode.capitalize(), mode) for mode in SEED_MODES]
        seed_mode = gr.Radio(seed_choices, value=SEED_MODES[0], label="Seed of the next image", scale=3, min_width=240)
    with gr.Accordion("Size, number of images, scheduler, variation", open=False):
        with gr.Row():
            schedulers = [("Default" if name == "base" else name, name) for name in get_args(Scheduler)]
            scheduler = gr.Dropdown(schedulers, value=default["scheduler"], label="Scheduler", min_width=120)
            width, height = (
                gr.Number(0, label=label, info="0 = default", precision=0, minimum=0, step=8, min_width=90)
                for label in ("Width", "Height")
            )
        with gr.Row():
            count = gr.Slider(
                1, MAX_SETTINGS["count"], default["count"], step=1, label="Number of images", min_width=200
            )
            variation = gr.Slider(0, 1, default["variation"], step=0.05, label="Variation strength", min_width=200)
        variation_seed = gr.Number(default["variation_seed"], label="Variation seed", precision=0, minimum=0)
    components = (seed, steps, guidance, scheduler, width, height, count, variation, variation_seed)
    return dict(zip(list(DEFAULT_SETTINGS)[2:], components, strict=True)), seed_mode


def _build_output(seed_mode: gr.Radio) -> OutputPanel:
    """Build the buttons, and the images below them."""
    with gr.Row():
        generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=2, min_width=120)
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        live = gr.Checkbox(False, label="Generate when a weight changes", scale=2, min_width=200)
    status = gr.Markdown(elem_id="status")
    image = gr.Image(
        label="Image",
        format="png",
        interactive=False,
        height=460,
        buttons=["download", "fullscreen"],
        elem_classes="fit-image",
    )
    comparison = gr.ImageSlider(
        label="Base model (left) and blend (right)", format="png", interactive=False, visible=False
    )
    gallery = gr.Gallery(
        label="Images of this session",
        format="png",
        columns=5,
        fit_columns=False,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="fit-image compact-gallery",
    )
    with gr.Row():
        compare = gr.Button("Compare with base model", min_width=160)
        image_file = gr.File(label="Load settings from a PNG", file_types=[".png"], height=170)
    command_accordion, command = build_command_box()
    return OutputPanel(
        seed_mode=seed_mode,
        live=live,
        generate=generate,
        stop=stop,
        status=status,
        image=image,
        comparison=comparison,
        gallery=gallery,
        image_paths=gr.State([]),
        compare=compare,
        image_file=image_file,
        command_accordion=command_accordion,
        command=command,
    )
