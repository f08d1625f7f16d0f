"""What a visitor has set on the Blend tab, as one value; and what it means to the library and to the command line."""

import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_diffusion.workflows.images.plan import Plan

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import Composition
from lora_diffusion.config.settings import EMBEDDED_BASE, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.search import Library, find_adapter
from lora_diffusion_studio.rows import Row, entry_of, reference, row_of

MOST = {"steps": 200, "width": 2048, "height": 2048, "count": 16}
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
class Form:
    """The Blend tab."""

    base: str = EMBEDDED_BASE
    rows: tuple[Row, ...] = ()
    mode: str = "sum"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Those of `GenerateConfig` that are not left to the base."""
    composition: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the mode has of its own, such as `switch_every`."""


def plan_of(form: Form, library: Library) -> Plan:
    """What to make. Raises ConfigError with one clear sentence for anything that cannot be."""
    if not str(form.settings.get("prompt", "")).strip():
        raise ConfigError("the prompt is empty; say what the picture shows")
    for name, most in MOST.items():
        value = form.settings.get(name)
        if value is not None and value > most:
            raise ConfigError(f"{name} is {value}; the studio makes at most {most}, the command line has no limit")
    return Plan(
        base=form.base,
        entries=tuple(entry_of(row, library) for row in form.rows),
        settings=validate(GenerateConfig, form.settings, source="settings"),
        composition=validate(Composition, {"mode": form.mode, **form.composition}, source="mode"),
    )


def form_of(plan: Plan, library: Library) -> tuple[Form, tuple[str, ...]]:
    """The form that a plan fills, and a sentence for each adapter that the library lacks, which is left out."""
    rows: list[Row] = []
    missing: list[str] = []
    for entry in plan.entries:
        try:
            rows.append(row_of(entry, library))
        except ConfigError as error:
            missing.append(f"left out: {error}")
    composition = plan.composition.model_dump(exclude_defaults=True)
    mode = composition.pop("mode", "sum")
    settings = plan.settings.model_dump(exclude_defaults=True)
    form = Form(base=plan.base, rows=tuple(rows), mode=mode, settings=settings, composition=composition)
    return form, tuple(missing)


def seeded(form: Form, way: str) -> Form:
    """The form with the seeds of its next picture: `random` draws a seed, `vary` the seed of a variation."""
    draw = random.randrange(2**31)
    if way == "random":
        return replace(form, settings={**form.settings, "seed": draw})
    if way == "vary":
        share = form.settings.get("variation") or VARIED
        return replace(form, settings={**form.settings, "variation": share, "variation_seed": draw})
    return form


def command_of(form: Form, library: Library, output: Path, command: str = "generate", *more: str) -> str:
    """The command that makes the same pictures. Raises ConfigError for weights that only a preset can say."""
    in_full = [row.name for row in form.rows if row.full]
    if in_full:
        raise ConfigError(f"{in_full[0]}: its weight has no short form; save a preset and use generate --preset")
    words = ["lora-diffusion", command, "--base", form.base]
    words += adapter_words(form.rows, library)
    words += ["--mode", form.mode] * (form.mode != "sum")
    given = {**form.composition, **{key: value for key, value in form.settings.items() if value not in (None, "")}}
    words += [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return shlex.join([*words, *more, "--output", str(output)])


def adapter_words(rows: Sequence[Row], library: Library) -> list[str]:
    """The flags for those adapters that are on."""
    return [
        word
        for row in rows
        if row.on
        for word in ("--adapter", f"{find_adapter(library, row.name).path}:{reference(row)}")
    ]
