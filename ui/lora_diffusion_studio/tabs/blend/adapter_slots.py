"""The adapter slots of the Blend tab: weight slider, trigger words and advanced options of each adapter.

The number of slots is fixed, because Gradio's components are built once. A slot is visible while it has an adapter.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_diffusion_studio.view_models.adapter_card import AdapterCard
from lora_diffusion_studio.view_models.adapter_slot import (
    MAX_WEIGHT,
    MIN_WEIGHT,
    SCHEDULES,
    AdapterSlot,
    get_option,
    get_schedule,
    with_options,
    with_schedule,
)
from lora_diffusion_studio.view_models.thumbnails import make_thumbnail

NUM_SLOTS = 8
SLOT_FIELDS = ("name", "enabled", "weight", "unet", "te", "lbw", "start", "stop", "schedule", "options", "weight_json")
"""Names of a slot's input components, in their order."""
_OPTIONS_WITH_COMPONENT = ("unet", "te", "lbw", "start", "stop")
"""Tag options that have a component of their own. The text field has the others."""
_MAX_TRIGGER_WORDS = 12


@dataclass(frozen=True, kw_only=True)
class SlotComponents:
    """The components of one adapter slot."""

    group: gr.Group
    thumbnail: gr.Image
    summary: gr.HTML
    trigger_words: gr.Radio
    weight_plot: gr.Image
    fields: dict[str, Any]
    """Input components by their name in `SLOT_FIELDS`."""

    @property
    def outputs(self) -> list[Any]:
        """The components that `slot_updates` changes, in its order."""
        return [self.group, self.thumbnail, self.summary, self.trigger_words, *self.fields.values()]


def build_slot(number: int, block_presets: Sequence[str]) -> SlotComponents:
    """Build an empty, hidden slot."""
    with gr.Group(visible=False, elem_classes="adapter-slot") as group:
        name = gr.Textbox(visible=False)
        with gr.Row():
            thumbnail = gr.Image(
                label=f"Preview of adapter {number}",
                show_label=False,
                container=False,
                height=84,
                width=84,
                min_width=84,
                scale=0,
                format="jpeg",
                interactive=False,
                buttons=[],
                elem_classes="thumbnail",
            )
            with gr.Column(scale=2, min_width=150):
                enabled = gr.Checkbox(True, label=f"Adapter {number}", container=False)
                summary = gr.HTML(elem_classes="summary")
            weight = gr.Slider(MIN_WEIGHT, MAX_WEIGHT, 1.0, step=0.05, label="Weight", scale=3, min_width=180)
        trigger_words = gr.Radio(
            [], label="Trigger words (click to add to the prompt)", visible=False, elem_classes="trigger-words"
        )
        advanced, weight_plot = _build_advanced(block_presets)
    return SlotComponents(
        group=group,
        thumbnail=thumbnail,
        summary=summary,
        trigger_words=trigger_words,
        weight_plot=weight_plot,
        fields={"name": name, "enabled": enabled, "weight": weight, **advanced},
    )


def _build_advanced(block_presets: Sequence[str]) -> tuple[dict[str, Any], gr.Image]:
    """Build the weights by component, block and step, and the plot of the result."""
    with gr.Accordion("Advanced", open=False):
        with gr.Row():
            unet = gr.Textbox(label="UNet weight", placeholder="same as Weight", min_width=110)
            te = gr.Textbox(label="Text encoder weight", placeholder="same as Weight", min_width=110)
        with gr.Row():
            lbw = gr.Dropdown(
                [("All blocks", ""), *((name, name) for name in block_presets)],
                value="",
                label="Block weights",
                info="Or type comma-separated values",
                allow_custom_value=True,
                min_width=140,
            )
            schedule = gr.Dropdown(
                list(SCHEDULES.items()),
                value="",
                label="Weight schedule",
                info="Or type linear=0@0.2,1@0.8",
                allow_custom_value=True,
                min_width=140,
            )
        with gr.Row():
            start = gr.Slider(0, 1, 0, step=0.05, label="Start", info="Fraction of steps", min_width=140)
            stop = gr.Slider(0, 1, 1, step=0.05, label="End", info="Fraction of steps", min_width=140)
        options = gr.Textbox(
            label="Other options",
            info="Any option of a <lora:...> tag: block and module weights, region",
            placeholder="IN04=0.5:*.attn2.*=0:box=0,0,0.5,1",
        )
        weight_json = gr.Textbox(label="Weight from the preset (JSON)", visible=False, lines=2)
        weight_plot = gr.Image(
            label="Effective weight", show_label=False, height=150, format="png", interactive=False, buttons=[]
        )
    fields = (unet, te, lbw, start, stop, schedule, options, weight_json)
    return dict(zip(SLOT_FIELDS[3:], fields, strict=True)), weight_plot


def parse_slots(values: Sequence[Any]) -> tuple[AdapterSlot, ...]:
    """Return the slots in the values of all input components, without empty ones.

    Raises:
        ConfigError: If a weight schedule is invalid.
    """
    count = len(SLOT_FIELDS)
    slots = (_parse_slot(values[start : start + count]) for start in range(0, len(values), count))
    return tuple(slot for slot in slots if slot)


def _parse_slot(values: Sequence[Any]) -> AdapterSlot | None:
    field = dict(zip(SLOT_FIELDS, values, strict=True))
    if not field["name"]:
        return None
    slot = AdapterSlot(
        name=field["name"],
        enabled=bool(field["enabled"]),
        weight=float(field["weight"] or 0),
        options=(field["options"] or "").strip(),
        weight_json=(field["weight_json"] or "").strip(),
    )
    start, stop = float(field["start"] or 0), float(1 if field["stop"] is None else field["stop"])
    slot = with_options(
        slot,
        unet=(field["unet"] or "").strip(),
        te=(field["te"] or "").strip(),
        lbw=(field["lbw"] or "").strip(),
        start=f"{start:.2f}" if start > 0 else "",
        stop=f"{stop:.2f}" if stop < 1 else "",
    )
    schedule = (field["schedule"] or "").strip()
    return with_schedule(slot, schedule) if schedule else slot


def slot_updates(slots: Sequence[AdapterSlot], get_card: Callable[[str], AdapterCard]) -> list[Any]:
    """Return the updates of the outputs of all slots that show these adapters.

    Raises:
        ConfigError: If an adapter is not in the library.
    """
    updates: list[Any] = []
    for number in range(NUM_SLOTS):
        slot = slots[number] if number < len(slots) else None
        card = get_card(slot.name) if slot else None
        words = card.trigger_words[:_MAX_TRIGGER_WORDS] if card else ()
        summary = html.escape(f"{card.summary}; preferred weight {card.preferred_weight:g}") if card else ""
        thumbnail = make_thumbnail(card.title, card.preview) if card else None
        trigger_words = gr.update(choices=list(words), value=None, visible=bool(words))
        fields = _field_values(slot, card) if slot and card else _EMPTY_FIELDS
        updates += [gr.update(visible=slot is not None), thumbnail, summary, trigger_words, *fields]
    return updates


_EMPTY_FIELDS: list[Any] = ["", True, 1.0, "", "", "", 0, 1, "", "", gr.update(value="", visible=False)]
"""Values of an empty slot's input components, in the order of `SLOT_FIELDS`."""


def _field_values(slot: AdapterSlot, card: AdapterCard) -> list[Any]:
    """Return the values of a slot's input components, in the order of `SLOT_FIELDS`."""
    other_options = with_schedule(with_options(slot, **dict.fromkeys(_OPTIONS_WITH_COMPONENT, "")), "").options
    lowest, highest = min(card.weight_range[0], slot.weight), max(card.weight_range[1], slot.weight)
    return [
        slot.name,
        gr.update(value=slot.enabled, label=slot.name.removesuffix(".safetensors")),
        gr.update(value=slot.weight, minimum=lowest, maximum=highest),
        get_option(slot, "unet"),
        get_option(slot, "te"),
        get_option(slot, "lbw"),
        float(get_option(slot, "start") or 0),
        float(get_option(slot, "stop") or 1),
        get_schedule(slot),
        other_options,
        gr.update(value=slot.weight_json, visible=bool(slot.weight_json)),
    ]
