"""What the controls of the Blend tab do."""

import html
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ui.forms import Form, command_of
from ui.rendering import Halted, Waiting
from ui.rows import Row
from ui.studio import Finished, Made, Step, Studio
from ui.tabs.blend import Blend, about_in, choices, form_from, form_updates, slot_outputs
from ui.tabs.events import DEVICE, QUICK, spoken, visitor_of
from ui.tabs.slots import Slot, rows_from, updates

KEPT = 48
"""Pictures in a visitor's gallery."""


def wire_blend(studio: Studio, blend: Blend) -> None:
    """Everything on the tab."""
    wire_generation(studio, blend)
    wire_comparison(studio, blend)
    wire_table(studio, blend)
    wire_recall(studio, blend)


def wire_generation(studio: Studio, blend: Blend) -> None:
    """Generate, Stop, and drawing as a weight moves."""

    @spoken
    def generate(request: gr.Request, seeds: str, kept: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        form = form_from(values)
        if seeds == "random":
            form = replace(form, settings={**form.settings, "seed": random.randrange(2**31)})
        for event in studio.render(form, visitor_of(request)):
            if isinstance(event, Step):
                yield event.text, gr.skip() if event.picture is None else event.picture, gr.skip(), gr.skip(), kept
            elif isinstance(event, Waiting | Halted):
                yield event.text, gr.skip(), gr.skip(), gr.skip(), kept
            elif isinstance(event, Made):
                kept = [str(event.path), *kept][:KEPT]
                yield gr.skip(), str(event.path), kept, gr.skip(), kept
            else:
                seed = form.settings["seed"] + (len(event.paths) if seeds == "next" else 0)
                yield finished_text(event), gr.skip(), gr.skip(), seed, kept

    @spoken
    def generate_live(request: gr.Request, live: bool, *values: Any) -> Iterator[tuple[Any, ...]]:
        if live:
            yield from generate(request, *values)

    stage = blend.stage
    outputs = [stage.status, stage.picture, stage.gallery, blend.settings["seed"], stage.kept]
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
        studio.device.stop(visitor_of(request))

    stage.stop.click(stop, None, None, **QUICK)


def wire_comparison(studio: Studio, blend: Blend) -> None:
    """The last picture beside what the base alone makes of the same settings."""
    stage = blend.stage

    @spoken
    def against_base(request: gr.Request, kept: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        form = form_from(values)
        if not kept:
            raise gr.Error("there is no picture yet; generate one first", print_exception=False)
        alone = Form(base=form.base, settings={**form.settings, "count": 1})
        for event in studio.render(alone, visitor_of(request)):
            if isinstance(event, Step | Waiting | Halted):
                yield event.text, gr.skip()
            elif isinstance(event, Made):
                pair = str(event.path), kept[0]
                yield "left of the line the base alone, right of it the blend", gr.update(value=pair, visible=True)

    stage.compare.click(
        against_base,
        [stage.kept, *blend.form_inputs],
        [stage.status, stage.slider],
        show_progress_on=[stage.status],
        **DEVICE,
    )


def wire_recall(studio: Studio, blend: Blend) -> None:
    """A picture that is dropped fills the form; the form is told as a command."""
    stage = blend.stage

    @spoken
    def restore(path: str | None) -> list[Any]:
        if not path:
            return [gr.skip()] * (len(blend.form_outputs) + 1)
        form, notes = studio.restored(Path(path))
        return [*form_updates(studio, form), html.escape("; ".join(notes) or "restored")]

    stage.dropped.upload(restore, stage.dropped, [*blend.form_outputs, stage.status], **QUICK)

    @spoken
    def as_command(*values: Any) -> str:
        return command_of(form_from(values), studio.library(), studio.places.output)

    stage.twin.expand(as_command, blend.form_inputs, stage.command, **QUICK)


def wire_table(studio: Studio, blend: Blend) -> None:
    """Adapters are put on the table and taken off it."""

    @spoken
    def lay(chosen: list[str], *values: Any) -> list[Any]:
        present = {row.name: row for row in rows_from(values)}
        fresh = {name: Row(name=name, weight=studio.card(name).preferred) for name in chosen if name not in present}
        return updates([present.get(name) or fresh[name] for name in chosen], about_in(studio))

    blend.chosen.input(
        lay, [blend.chosen, *blend.table_inputs], slot_outputs(blend.slots), trigger_mode="always_last", **QUICK
    )

    @spoken
    def rebase(base: str) -> list[Any]:
        return [gr.update(choices=choices(studio, base), value=[]), *updates([], about_in(studio))]

    blend.base.input(rebase, blend.base, [blend.chosen, *slot_outputs(blend.slots)], **QUICK)
    blend.mode.change(lambda mode: gr.update(visible=mode == "switch"), blend.mode, blend.switch_every, **QUICK)
    for slot in blend.slots:
        wire_slot(studio, blend, slot)


def wire_slot(studio: Studio, blend: Blend, slot: Slot) -> None:
    """The trigger button of a place puts its word into the prompt; the picture shows how the adapter acts."""

    @spoken
    def say(prompt: str, name: str) -> str:
        words = [word for word in studio.card(name).triggers[:1] if word not in prompt]
        return ", ".join(filter(None, (prompt, *words)))

    prompt = blend.settings["prompt"]
    slot.trigger.click(say, [prompt, slot.fields["name"]], prompt, **QUICK)

    @spoken
    def act(base: str, *values: Any) -> Any:
        rows = rows_from(values)
        return studio.acting(base, rows[0]) if rows else None

    watched = [slot.fields[name].change for name in ("weight", "lbw", "start", "stop", "options")]
    gr.on(watched, act, [blend.base, *slot.fields.values()], slot.picture, trigger_mode="always_last", **QUICK)


def finished_text(event: Finished) -> str:
    """What is said at the end."""
    names = ", ".join(path.name for path in event.paths)
    notes = "".join(f" Note: {html.escape(note)}." for note in event.notes)
    return f"{html.escape(names)} in {event.seconds:.1f} s.{notes}"
