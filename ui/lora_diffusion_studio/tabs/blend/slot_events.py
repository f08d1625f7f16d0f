"""Events of the Blend tab that change the adapter slots: selection, gallery, base model, blend mode, trigger words."""

# Gradio's events are untyped.
# pyright: standard

from collections.abc import Sequence
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.blend.adapter_gallery import adapter_choices, add_adapter, gallery_updates
from lora_diffusion_studio.tabs.blend.adapter_slots import NUM_SLOTS, SlotComponents, parse_slots, slot_updates
from lora_diffusion_studio.tabs.blend.form_values import mode_updates
from lora_diffusion_studio.tabs.blend.layout import BlendTab
from lora_diffusion_studio.tabs.handlers import QUICK, with_messages
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot


def connect_slots(studio: Studio, blend: BlendTab) -> None:
    """Connect the adapter selection, the gallery, the base model, the blend mode and every slot."""
    _connect_selection(studio, blend)
    _connect_search(studio, blend)
    _connect_base_and_mode(studio, blend)
    for slot in blend.slots:
        _connect_slot(studio, blend, slot)


def _connect_selection(studio: Studio, blend: BlendTab) -> None:
    """Connect the dropdown and the gallery, which both select adapters."""

    def show_selected(names: list[str], slot_values: Sequence[Any]) -> list[Any]:
        present = {slot.name: slot for slot in parse_slots(slot_values)}
        added = {
            name: AdapterSlot(name=name, weight=studio.get_card(name).preferred_weight)
            for name in names
            if name not in present
        }
        return slot_updates([present.get(name) or added[name] for name in names], studio.get_card)

    @with_messages
    def select(names: list[str], *slot_values: Any) -> list[Any]:
        return show_selected(names, slot_values)

    inputs = [blend.adapters, *blend.slot_inputs]
    blend.adapters.input(select, inputs, blend.slot_outputs, trigger_mode="always_last", **QUICK)

    @with_messages
    def click_thumbnail(data: gr.SelectData, shown: list[str], names: list[str], *slot_values: Any) -> list[Any]:
        selected = add_adapter(names, shown[int(data.index)], NUM_SLOTS)
        return [selected, gr.update(selected_index=None), *show_selected(selected, slot_values)]

    gallery = blend.adapter_gallery
    outputs = [blend.adapters, gallery.thumbnails, *blend.slot_outputs]
    gallery.thumbnails.select(click_thumbnail, [gallery.names, *inputs], outputs, **QUICK)


def _connect_search(studio: Studio, blend: BlendTab) -> None:
    gallery = blend.adapter_gallery

    @with_messages
    def search(base: str, text: str, kind: str) -> list[Any]:
        return gallery_updates(studio, base, text or "", kind or "")

    gr.on(
        [gallery.search.change, gallery.kind.input],
        search,
        [blend.base, gallery.search, gallery.kind],
        gallery.outputs,
        trigger_mode="always_last",
        **QUICK,
    )


def _connect_base_and_mode(studio: Studio, blend: BlendTab) -> None:
    """Connect the base model, whose change clears the slots, and the blend mode, whose change shows its settings."""

    @with_messages
    def change_base(base: str) -> list[Any]:
        adapters = gr.update(choices=adapter_choices(studio, base), value=[])
        return [adapters, *gallery_updates(studio, base), *slot_updates([], studio.get_card)]

    outputs = [blend.adapters, *blend.adapter_gallery.outputs, *blend.slot_outputs]
    blend.base.input(change_base, blend.base, outputs, **QUICK)

    def change_mode(mode: str) -> list[Any]:
        return mode_updates(mode, {})

    blend.mode.input(change_mode, blend.mode, list(blend.composition.values()), **QUICK)


def _connect_slot(studio: Studio, blend: BlendTab, slot: SlotComponents) -> None:
    """Connect the trigger words, which are added to the prompt, and the plot of the weight."""

    def add_to_prompt(prompt: str, word: str) -> list[Any]:
        return [", ".join(filter(None, (prompt, word if word not in prompt else ""))), None]

    prompt = blend.settings["prompt"]
    slot.trigger_words.input(add_to_prompt, [prompt, slot.trigger_words], [prompt, slot.trigger_words], **QUICK)

    @with_messages
    def plot(base: str, *slot_values: Any) -> Any:
        slots = parse_slots(slot_values)
        return studio.plot_weight(base, slots[0]) if slots else None

    changes = [slot.fields[name].change for name in ("weight", "lbw", "start", "stop", "schedule", "options")]
    inputs = [blend.base, *slot.fields.values()]
    gr.on(changes, plot, inputs, slot.weight_plot, trigger_mode="always_last", **QUICK)
