"""What changes along the sides of a grid of pictures, and a blend without one of its blocks: plans made of a plan."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.coefficients import BlockPresets, expand_block_preset
from lora_diffusion.architectures.blocks import vector_block_names
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendEntry, BlendWeight, Composition, Weight
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.entry import adapter_stem
from lora_diffusion.workflows.images.plan import Plan

MOST_CELLS = 64
NOTHING = "nothing"
TEXTS = ("prompt", "negative_prompt")
"""Settings whose values may hold commas, so that a `|` stands between them."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What changes along one side."""

    what: str = NOTHING
    """A key of `CHANGES`."""
    values: tuple[str, ...] = ("",)
    of: str = ""
    """Which adapter, for a weight or a block preset: its file's name, or its number from 1; the first if empty."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What is written beside the pictures."""
        if self.what == NOTHING:
            return ("",)
        if self.what in TEXTS:
            return self.values
        name = " of ".join(filter(None, (self.what, self.of and adapter_stem(Path(self.of)))))
        return tuple(f"{name} {value}" for value in self.values)


def axis(what: str, text: str, of: str = "") -> Axis:
    """From what a person wrote: values with commas between, prompts with `|`. Raises ConfigError."""
    what = what.strip().replace("-", "_") if what.strip() != "block-preset" else "block preset"
    if what == NOTHING:
        return Axis()
    if what not in CHANGES:
        raise ConfigError(f"{what!r} cannot be compared; choose one of {', '.join(CHANGES)}")
    values = tuple(part.strip() for part in text.split("|" if what in TEXTS else ",") if part.strip())
    if not values:
        raise ConfigError(f"no values for {what}; write some, with {'a |' if what in TEXTS else 'commas'} between")
    return Axis(what=what, values=values, of=of)


def axis_from(text: str) -> Axis:
    """`weight:neon=0,0.5,1` or `seed=1,2` as the command line has it. Raises ConfigError."""
    found = re.fullmatch(r"(?P<what>[^:=]+)(?::(?P<of>[^=]+))?=(?P<values>.*)", text, re.DOTALL)
    if not found:
        raise ConfigError(f"{text!r}: expected WHAT=VALUES or WHAT:ADAPTER=VALUES, e.g. weight:neon=0,0.5,1")
    return axis(found["what"], found["values"], found["of"] or "")


def axis_text(side: Axis) -> str:
    """The inverse."""
    what = "block-preset" if side.what == "block preset" else side.what
    between = "|" if side.what in TEXTS else ","
    return f"{what}{side.of and ':'}{side.of}={between.join(side.values)}"


def cells(plan: Plan, across: Axis, down: Axis) -> list[list[Plan]]:
    """The plan of each picture, row by row. Raises ConfigError for a value that cannot be."""
    count = len(across.values) * len(down.values)
    if count > MOST_CELLS:
        raise ConfigError(f"{count} pictures are more than a grid holds; {MOST_CELLS} at most")
    single = replace(plan, settings=plan.settings.model_copy(update={"count": 1}))
    return [[changed(changed(single, down, y), across, x) for x in across.values] for y in down.values]


def changed(plan: Plan, side: Axis, value: str) -> Plan:
    """The plan with this value. Raises ConfigError."""
    try:
        return CHANGES[side.what](plan, value, side.of)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{side.what}: {value!r} is no number; write values like 0, 0.5, 1") from None


def set_setting(name: str) -> Callable[[Plan, str, str], Plan]:
    """A setting of the picture."""

    def change(plan: Plan, value: str, _of: str) -> Plan:
        number = float(value) if name == "guidance" else int(value) if name in ("seed", "steps") else value
        settings = validate(GenerateConfig, {**plan.settings.model_dump(), name: number}, source="the grid")
        return replace(plan, settings=settings)

    return change


def set_weight(update: Callable[[str], Mapping[str, Any]]) -> Callable[[Plan, str, str], Plan]:
    """A change of one adapter's weight."""

    def change(plan: Plan, value: str, of: str) -> Plan:
        at = place_of(plan.entries, of)
        weight = validate(BlendWeight, {**in_full(plan.entries[at].weight).model_dump(), **update(value)}, source=value)
        return replace(plan, entries=with_weight(plan.entries, at, weight))

    return change


def alone(plan: Plan, value: str, _of: str) -> Plan:
    """One adapter by itself, at its weight."""
    return replace(plan, entries=(plan.entries[place_of(plan.entries, value)],))


def set_mode(plan: Plan, value: str, _of: str) -> Plan:
    """Another way of putting the adapters together, with its own defaults."""
    return replace(plan, composition=validate(Composition, {"mode": value}, source="the grid"))


CHANGES: dict[str, Callable[[Plan, str, str], Plan]] = {
    "weight": set_weight(lambda value: {"value": float(value)}),
    "block preset": set_weight(lambda value: {"blocks": value}),
    "adapter": alone,
    "mode": set_mode,
    **{name: set_setting(name) for name in ("seed", "steps", "guidance", "scheduler", *TEXTS)},
    NOTHING: lambda plan, _, __: plan,
}


def place_of(entries: Sequence[BlendEntry], of: str) -> int:
    """Which entry is meant: a number from 1, a file's name or the end of its path. Raises ConfigError."""
    if not entries:
        raise ConfigError("no adapter is on the table; put one there, or compare something else")
    if not of:
        return 0
    if of.isdecimal() and 1 <= int(of) <= len(entries):
        return int(of) - 1
    wanted = Path(of)
    for place, entry in enumerate(entries):
        path = Path(entry.path)
        same_folder = path.parent.parts[len(path.parent.parts) - len(wanted.parent.parts) :] == wanted.parent.parts
        if of == entry.name or (same_folder and adapter_stem(path) == adapter_stem(wanted)):
            return place
    known = ", ".join(entry.name or adapter_stem(Path(entry.path)) for entry in entries)
    raise ConfigError(f"{of}: is not on the table; name one of {known}")


def in_full(weight: Weight) -> BlendWeight:
    """A weight that is a number, as one with parts."""
    return weight if isinstance(weight, BlendWeight) else BlendWeight(value=weight)


def with_weight(entries: tuple[BlendEntry, ...], at: int, weight: BlendWeight) -> tuple[BlendEntry, ...]:
    """The entries with another weight for one; a weight that is no more than a number is one."""
    plain = weight.value if weight == BlendWeight(value=weight.value) else weight
    return (*entries[:at], entries[at].model_copy(update={"weight": plain}), *entries[at + 1 :])


def without_blocks(plan: Plan, of: str, layout: ModelLayout, presets: BlockPresets | None = None) -> dict[str, Plan]:
    """The plan without each block of one adapter, by block; under "" the plan with all of them. Raises ConfigError."""
    single = replace(plan, settings=plan.settings.model_copy(update={"count": 1}))
    at = place_of(plan.entries, of)
    weight = in_full(expand_block_preset(plan.entries[at].weight, layout, presets))
    factors = dict(weight.blocks) if isinstance(weight.blocks, Mapping) else {}
    _, attentive = vector_block_names(layout)
    found = {"": single}
    for block in attentive:
        less = weight.model_copy(update={"blocks": {**factors, block: 0.0}})
        found[block] = replace(single, entries=with_weight(plan.entries, at, less))
    return found
