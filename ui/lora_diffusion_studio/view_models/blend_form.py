"""The values of the Blend tab, and their conversion to a generation request and to a command line."""

import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import Composition, Mode
from lora_diffusion.config.settings import EMBEDDED_BASE, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.search import Library, find_adapter
from lora_diffusion.workflows.images.request import GenerationRequest
from lora_diffusion_studio.view_models.adapter_slot import (
    AdapterSlot,
    entry_from_slot,
    format_reference,
    slot_from_entry,
)

MAX_SETTINGS = {"num_inference_steps": 200, "width": 2048, "height": 2048, "count": 16}
"""Largest values that the studio accepts for one request."""
SEED_MODES = ("fixed", "random", "increment", "variation")
"""How the seed of the next image is chosen.

`fixed` keeps it, `random` draws one, `increment` adds 1 after each image, `variation` keeps the seed and draws a
variation seed.
"""
DEFAULT_MODE: Mode = Composition.model_fields["mode"].default
"""Composition mode of a new form."""
DEFAULT_VARIATION = 0.2
"""Variation strength in the seed mode `variation` if the slider is at 0."""


@dataclass(frozen=True, kw_only=True)
class BlendForm:
    """The values of the Blend tab."""

    base: str = EMBEDDED_BASE
    slots: tuple[AdapterSlot, ...] = ()
    mode: str = DEFAULT_MODE
    """Composition mode, see `Composition.mode`."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of `GenerateConfig`. Those that are not set have their default value."""
    composition: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of `Composition` apart from the mode, such as `switch_every`."""


def make_request(form: BlendForm, library: Library) -> GenerationRequest:
    """Return the generation request of a form.

    Raises:
        ConfigError: If the prompt is empty, a value is invalid or too large, or an adapter is not in the library.
    """
    if not str(form.settings.get("prompt", "")).strip():
        raise ConfigError("the prompt is empty; describe the image in the Prompt field")
    for name, limit in MAX_SETTINGS.items():
        value = form.settings.get(name)
        if value is not None and value > limit:
            raise ConfigError(
                f"{name} is {value}, but the studio accepts at most {limit}; the command line has no limit"
            )
    return GenerationRequest(
        base=form.base,
        entries=tuple(entry_from_slot(slot, library) for slot in form.slots),
        settings=validate(GenerateConfig, form.settings, source="settings"),
        composition=validate(Composition, {"mode": form.mode, **form.composition}, source="mode"),
    )


def form_from_request(request: GenerationRequest, library: Library) -> tuple[BlendForm, tuple[str, ...]]:
    """Return the form of a request, and a note for each adapter that was left out because the library lacks it."""
    slots: list[AdapterSlot] = []
    notes: list[str] = []
    for entry in request.entries:
        try:
            slots.append(slot_from_entry(entry, library))
        except ConfigError as error:
            notes.append(f"left out: {error}")
    composition = request.composition.model_dump(exclude_defaults=True)
    mode = composition.pop("mode", DEFAULT_MODE)
    settings = request.settings.model_dump(exclude_defaults=True)
    form = BlendForm(base=request.base, slots=tuple(slots), mode=mode, settings=settings, composition=composition)
    return form, tuple(notes)


def with_next_seed(form: BlendForm, seed_mode: str) -> BlendForm:
    """Return the form with the seeds of the next image: a new seed for `random`, a variation seed for `variation`."""
    drawn = random.randrange(2**31)
    if seed_mode == "random":
        return replace(form, settings={**form.settings, "seed": drawn})
    if seed_mode == "variation":
        strength = form.settings.get("variation") or DEFAULT_VARIATION
        return replace(form, settings={**form.settings, "variation": strength, "variation_seed": drawn})
    return form


def format_command(form: BlendForm, library: Library, output: Path, command: str = "generate", *more: str) -> str:
    """Return the shell command that makes the same images.

    Raises:
        ConfigError: If a weight can be stored in a preset only, or an adapter is not in the library.
    """
    preset_only = [slot.name for slot in form.slots if slot.weight_json]
    if preset_only:
        raise ConfigError(
            f"{preset_only[0]}: its weight cannot be written as a flag; save the blend as a preset and run "
            "lora-diffusion generate --preset FILE"
        )
    words = ["lora-diffusion", command, "--base", form.base]
    words += adapter_flags(form.slots, library)
    words += ["--mode", form.mode] * (form.mode != DEFAULT_MODE)
    given = {**form.composition, **{key: value for key, value in form.settings.items() if value not in (None, "")}}
    for key, value in given.items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join([*words, *more, "--output", str(output)])


def adapter_flags(slots: Sequence[AdapterSlot], library: Library) -> list[str]:
    """Return the `--adapter` flags of the enabled slots."""
    return [
        word
        for slot in slots
        if slot.enabled
        for word in ("--adapter", f"{find_adapter(library, slot.name).path}:{format_reference(slot)}")
    ]
