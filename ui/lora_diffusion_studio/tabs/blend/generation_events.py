"""What the controls of the Blend tab do."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion_studio.backend.device_queue import Halted, Waiting
from lora_diffusion_studio.backend.studio import Finished, ImageSaved, StepTaken, Studio
from lora_diffusion_studio.tabs.blend.adapter_gallery import add_picked, gallery_updates
from lora_diffusion_studio.tabs.blend.adapter_slots import SLOTS, SlotComponents, parse_slots, slot_updates
from lora_diffusion_studio.tabs.blend.layout import BlendTab, form_from, form_updates, list_choices, mode_updates
from lora_diffusion_studio.tabs.handlers import DEVICE, QUICK, visitor_id, with_messages
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm, with_next_seed

KEPT = 48
"""Pictures in a visitor's gallery."""


def wire_blend(studio: Studio, blend: BlendTab) -> None:
    """Everything on the tab."""
    wire_generation(studio, blend)
    wire_comparison(studio, blend)
    wire_table(studio, blend)
    wire_recall(studio, blend)


def wire_generation(studio: Studio, blend: BlendTab) -> None:
    """Generate, Stop, and drawing as a weight moves."""

    stage, settings = blend.stage, blend.settings

    @with_messages
    def generate(request: gr.Request, seeds: str, kept: list[str], *values: Any) -> Iterator[dict[Any, Any]]:
        form = with_next_seed(form_from(values), seeds)
        for event in studio.render(form, visitor_id(request)):
            if isinstance(event, StepTaken):
                shown = {} if event.picture is None else {stage.picture: event.picture}
                yield {stage.status: event.text, **shown}
            elif isinstance(event, Waiting | Halted):
                yield {stage.status: event.text}
            elif isinstance(event, ImageSaved):
                kept = [str(event.path), *kept][:KEPT]
                yield {stage.picture: str(event.path), stage.gallery: kept, stage.kept: kept}
            else:
                on = len(event.paths) if seeds == "next" else 0
                used = {name: form.settings.get(name, 0) for name in ("seed", "variation", "variation_seed")}
                used["seed"] += on
                yield {stage.status: format_finished(event), **{settings[name]: value for name, value in used.items()}}

    @with_messages
    def generate_live(request: gr.Request, live: bool, *values: Any) -> Iterator[dict[Any, Any]]:
        yield {blend.stage.status: gr.skip()}  # a stream of nothing at all would empty every output
        if live:
            yield from generate(request, *values)

    numbers = [settings[name] for name in ("seed", "variation", "variation_seed")]
    outputs = [stage.status, stage.picture, stage.gallery, stage.kept, *numbers]
    inputs = [stage.seeds, stage.kept, *blend.form_inputs]
    stage.go.click(generate, inputs, outputs, show_progress_on=[stage.status], **DEVICE)
    moved = [slot.fields["weight"].release for slot in blend.slots]
    gr.on(
        moved,
        generate_live,
        [stage.live, *inputs],
        outputs,
        show_progress_on=[stage.status],
        trigger_mode="always_last",
        **DEVICE,
    )

    def stop(request: gr.Request) -> None:
        studio.device.stop(visitor_id(request))

    stage.stop.click(stop, None, None, **QUICK)


def wire_comparison(studio: Studio, blend: BlendTab) -> None:
    """The last picture beside what the base alone makes of the same settings."""
    stage = blend.stage

    @with_messages
    def against_base(request: gr.Request, kept: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        form = form_from(values)
        if not kept:
            raise gr.Error("there is no picture yet; generate one first", print_exception=False)
        alone = BlendForm(base=form.base, settings={**form.settings, "count": 1})
        for event in studio.render(alone, visitor_id(request)):
            if isinstance(event, StepTaken | Waiting | Halted):
                yield event.text, gr.skip()
            elif isinstance(event, ImageSaved):
                pair = str(event.path), kept[0]
                yield "left of the line the base alone, right of it the blend", gr.update(value=pair, visible=True)

    stage.compare.click(
        against_base,
        [stage.kept, *blend.form_inputs],
        [stage.status, stage.slider],
        show_progress_on=[stage.status],
        **DEVICE,
    )


def wire_recall(studio: Studio, blend: BlendTab) -> None:
    """A picture that is dropped fills the form; the form is told as a command."""
    stage = blend.stage

    @with_messages
    def restore(path: str | None) -> list[Any]:
        if not path:
            return [gr.skip()] * (len(blend.form_outputs) + 1)
        form, notes = studio.restore_form(Path(path))
        return [*form_updates(studio, form), html.escape("; ".join(notes) or "restored")]

    stage.dropped.upload(restore, stage.dropped, [*blend.form_outputs, stage.status], **QUICK)

    @with_messages
    def as_command(*values: Any) -> str:
        return studio.format_command(form_from(values))

    stage.twin.expand(as_command, blend.form_inputs, stage.command, **QUICK)


def wire_table(studio: Studio, blend: BlendTab) -> None:
    """Adapters are put on the table and taken off it."""

    def laid(chosen: list[str], values: Sequence[Any]) -> list[Any]:
        present = {row.name: row for row in parse_slots(values)}
        fresh = {
            name: AdapterSlot(name=name, weight=studio.card(name).preferred) for name in chosen if name not in present
        }
        return slot_updates([present.get(name) or fresh[name] for name in chosen], studio.card)

    @with_messages
    def lay(chosen: list[str], *values: Any) -> list[Any]:
        return laid(chosen, values)

    blend.chosen.input(
        lay, [blend.chosen, *blend.table_inputs], blend.table_outputs, trigger_mode="always_last", **QUICK
    )

    @with_messages
    def pick(data: gr.SelectData, names: list[str], chosen: list[str], *values: Any) -> list[Any]:
        wanted = add_picked(chosen, names[int(data.index)], SLOTS)
        return [wanted, gr.update(selected_index=None), *laid(wanted, values)]

    adapter_gallery = blend.adapter_gallery
    picked = [blend.chosen, adapter_gallery.cards, *blend.table_outputs]
    adapter_gallery.cards.select(pick, [adapter_gallery.names, blend.chosen, *blend.table_inputs], picked, **QUICK)

    @with_messages
    def look(base: str, text: str, kind: str) -> list[Any]:
        return gallery_updates(studio, base, text or "", kind or "")

    sought = [blend.base, adapter_gallery.text, adapter_gallery.kind]
    gr.on(
        [adapter_gallery.text.change, adapter_gallery.kind.input],
        look,
        sought,
        adapter_gallery.outputs,
        trigger_mode="always_last",
        **QUICK,
    )
    wire_base(studio, blend)
    for slot in blend.slots:
        wire_slot(studio, blend, slot)


def wire_base(studio: Studio, blend: BlendTab) -> None:
    """Another base clears the table; a mode shows its settings."""

    @with_messages
    def rebase(base: str) -> list[Any]:
        chosen = gr.update(choices=list_choices(studio, base), value=[])
        return [chosen, *gallery_updates(studio, base), *slot_updates([], studio.card)]

    blend.base.input(rebase, blend.base, [blend.chosen, *blend.adapter_gallery.outputs, *blend.table_outputs], **QUICK)

    def show(mode: str) -> list[Any]:
        return mode_updates(mode, {})

    blend.mode.input(show, blend.mode, list(blend.composition.values()), **QUICK)


def wire_slot(studio: Studio, blend: BlendTab, slot: SlotComponents) -> None:
    """A trigger word that is clicked goes into the prompt; the picture shows how the adapter acts."""

    def say(prompt: str, word: str) -> list[Any]:
        return [", ".join(filter(None, (prompt, word if word not in prompt else ""))), None]

    prompt = blend.settings["prompt"]
    slot.words.input(say, [prompt, slot.words], [prompt, slot.words], **QUICK)

    @with_messages
    def act(base: str, *values: Any) -> Any:
        rows = parse_slots(values)
        return studio.draw_effect(base, rows[0]) if rows else None

    watched = [slot.fields[name].change for name in ("weight", "lbw", "start", "stop", "curve", "options")]
    gr.on(watched, act, [blend.base, *slot.fields.values()], slot.picture, trigger_mode="always_last", **QUICK)


def format_finished(event: Finished) -> str:
    """What is said at the end."""
    names = ", ".join(path.name for path in event.paths)
    notes = "".join(f" Note: {html.escape(note)}." for note in event.notes)
    return f"{html.escape(names)} in {event.seconds:.1f} s.{notes}"
