"""Conversion between the component values of the Blend tab and a `BlendForm`."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import MODE_OF, Composition
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_gallery import adapter_choices
from lora_diffusion_studio.tabs.blend.adapter_slots import parse_slots, slot_updates
from lora_diffusion_studio.view_models.blend_form import BlendForm

COMPOSITION_SETTINGS = (*MODE_OF, "parallel")
"""Fields of `Composition` with a component, in the order of the components."""
_GENERATE_SETTINGS = (
    "prompt",
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "width",
    "height",
    "count",
    "variation",
    "variation_seed",
)
DEFAULT_SETTINGS: dict[str, Any] = {
    **{name: GenerateConfig.model_fields[name].default for name in _GENERATE_SETTINGS},
    "prompt": "",
    "width": 0,
    "height": 0,
}
"""Default values of the settings, in the order of their components. A size of 0 means that of the base model."""
_INTEGER_SETTINGS = ("seed", "num_inference_steps", "width", "height", "count", "variation_seed", "switch_every")


def read_form(values: Sequence[Any]) -> BlendForm:
    """Return the form in the values of `BlendTab.form_inputs`."""
    base, mode, *rest = values
    split = len(COMPOSITION_SETTINGS)
    composition = {
        name: value
        for name, value in zip(COMPOSITION_SETTINGS, rest[:split], strict=True)
        if _is_used(name, value, mode)
    }
    given = dict(zip(DEFAULT_SETTINGS, rest[split:], strict=False))
    if not given["variation"]:
        given["variation_seed"] = 0
    changed = {
        name: given[name] for name, default in DEFAULT_SETTINGS.items() if given[name] not in (None, "", default)
    }
    always_shown = {
        "prompt": "",
        "seed": 0,
        "num_inference_steps": DEFAULT_SETTINGS["num_inference_steps"],
        "guidance_scale": given["guidance_scale"],
    }
    return BlendForm(
        base=base,
        mode=mode,
        slots=parse_slots(rest[split + len(DEFAULT_SETTINGS) :]),
        settings=_with_integers({**always_shown, **changed}),
        composition=_with_integers(composition),
    )


def _is_used(name: str, value: object, mode: str) -> bool:
    """Return whether the blend mode uses this setting."""
    return bool(value) if name == "parallel" else MODE_OF[name] == mode and value is not None


def _with_integers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with whole numbers as int, because browsers send them as float."""
    return {name: int(value) if name in _INTEGER_SETTINGS else value for name, value in settings.items()}


def form_updates(studio: Studio, form: BlendForm) -> list[Any]:
    """Return the updates of `BlendTab.form_outputs` that show a form."""
    base = form.base if form.base in studio.config.bases else studio.config.bases[0]
    adapters = gr.update(choices=adapter_choices(studio, base), value=[slot.name for slot in form.slots])
    composition = mode_updates(form.mode, form.composition)
    settings = [form.settings.get(name, default) for name, default in DEFAULT_SETTINGS.items()]
    return [base, adapters, form.mode, *composition, *settings, *slot_updates(form.slots, studio.get_card)]


def mode_updates(mode: str, given: Mapping[str, Any]) -> list[Any]:
    """Return the updates that show the settings of a blend mode and hide those of the others."""
    defaults = {name: Composition.model_fields[name].default for name in COMPOSITION_SETTINGS}
    return [
        gr.update(value=given.get(name, default), visible=MODE_OF.get(name, mode) == mode)
        for name, default in defaults.items()
    ]
