"""What a visitor has set on the Blend tab, as one value; and what it means to the library and to the command line."""

import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import Composition
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

MOST = {"num_inference_steps": 200, "width": 2048, "height": 2048, "count": 16}
"""What one visitor may ask for at once."""
MODES = {
    "sum": "Sum",
    "switch": "Switch: one at a time",
    "composite": "Composite: mean of predictions",
    "k-lora": "K-LoRA: the stronger of two",
    "np-lora": "Projected: first without the others' directions",
}


SEEDS = ("fixed", "random", "next", "vary")
"""What the next picture's seeds are: as they stand, drawn, one on, or a variation of the seed's picture."""
VARIED = 0.2
"""How far a variation goes where nobody says how far."""


@dataclass(frozen=True, kw_only=True)
class BlendForm:
    """The values of the Blend tab."""

    base: str = EMBEDDED_BASE
    rows: tuple[AdapterSlot, ...] = ()
    mode: str = "sum"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Those of `GenerateConfig` that are not left to the base."""
    composition: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the mode has of its own, such as `switch_every`."""


def make_request(form: BlendForm, library: Library) -> GenerationRequest:
    """Make the generation request of a form. Raises ConfigError for invalid values."""
    if not str(form.settings.get("prompt", "")).strip():
        raise ConfigError("the prompt is empty; say what the picture shows")
    for name, most in MOST.items():
        value = form.settings.get(name)
        if value is not None and value > most:
            raise ConfigError(f"{name} is {value}; the studio makes at most {most}, the command line has no limit")
    return GenerationRequest(
        base=form.base,
        entries=tuple(entry_from_slot(row, library) for row in form.rows),
        settings=validate(GenerateConfig, form.settings, source="settings"),
        composition=validate(Composition, {"mode": form.mode, **form.composition}, source="mode"),
    )


def form_from_request(request: GenerationRequest, library: Library) -> tuple[BlendForm, tuple[str, ...]]:
    """Return the form of a request, with notes on adapters that the library lacks, which are left out."""
    rows: list[AdapterSlot] = []
    missing: list[str] = []
    for entry in request.entries:
        try:
            rows.append(slot_from_entry(entry, library))
        except ConfigError as error:
            missing.append(f"left out: {error}")
    composition = request.composition.model_dump(exclude_defaults=True)
    mode = composition.pop("mode", "sum")
    settings = request.settings.model_dump(exclude_defaults=True)
    form = BlendForm(base=request.base, rows=tuple(rows), mode=mode, settings=settings, composition=composition)
    return form, tuple(missing)


def with_next_seed(form: BlendForm, way: str) -> BlendForm:
    """Return the form with the seeds of the next picture: `random` draws a seed, `vary` a variation seed."""
    draw = random.randrange(2**31)
    if way == "random":
        return replace(form, settings={**form.settings, "seed": draw})
    if way == "vary":
        share = form.settings.get("variation") or VARIED
        return replace(form, settings={**form.settings, "variation": share, "variation_seed": draw})
    return form


def format_command(form: BlendForm, library: Library, output: Path, command: str = "generate", *more: str) -> str:
    """Return the command that makes the same pictures. Raises ConfigError for weights only presets can hold."""
    in_full = [row.name for row in form.rows if row.full]
    if in_full:
        raise ConfigError(f"{in_full[0]}: its weight has no short form; save a preset and use generate --preset")
    words = ["lora-diffusion", command, "--base", form.base]
    words += adapter_flags(form.rows, library)
    words += ["--mode", form.mode] * (form.mode != "sum")
    given = {**form.composition, **{key: value for key, value in form.settings.items() if value not in (None, "")}}
    words += [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return shlex.join([*words, *more, "--output", str(output)])


def adapter_flags(rows: Sequence[AdapterSlot], library: Library) -> list[str]:
    """Return the flags of the enabled adapters."""
    return [
        word
        for row in rows
        if row.on
        for word in ("--adapter", f"{find_adapter(library, row.name).path}:{format_reference(row)}")
    ]
