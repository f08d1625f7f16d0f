"""Grid axes: the requests of a grid of pictures over two settings, or of a blend without one block at a time."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.coefficients import BlockPresets, expand_block_preset
from lora_diffusion.architectures.blocks import vector_block_names
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.generate import SHORT_NAMES, GenerateConfig
from lora_diffusion.config.preset import BlendEntry, BlendWeight, Composition, Weight
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.entry import adapter_stem
from lora_diffusion.workflows.images.request import GenerationRequest

_MOST_CELLS = 64
NOTHING = "nothing"
TEXTS = ("prompt", "negative_prompt")
"""Settings whose values may hold commas, so that a `|` stands between them."""


@dataclass(frozen=True, kw_only=True)
class GridAxis:
    """The setting that changes along one side of a grid, and its values."""

    what: str = NOTHING
    """A key of `CHANGES`."""
    values: tuple[str, ...] = ("",)
    of: str = ""
    """Which adapter, for a weight or a block preset: its file's name, or its number from 1; the first if empty."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the rows or columns."""
        if self.what == NOTHING:
            return ("",)
        if self.what in TEXTS:
            return self.values
        name = " of ".join(filter(None, (self.what, self.of and adapter_stem(Path(self.of)))))
        return tuple(f"{name} {value}" for value in self.values)


def make_axis(what: str, text: str, of: str = "") -> GridAxis:
    """Make an axis from comma-separated values, or prompts separated by `|`. Raises ConfigError."""
    what = what.strip().replace("-", "_") if what.strip() != "block-preset" else "block preset"
    if what == NOTHING:
        return GridAxis()
    if what not in CHANGES:
        raise ConfigError(f"{what!r} cannot be compared; choose one of {', '.join(CHANGES)}")
    values = tuple(part.strip() for part in text.split("|" if what in TEXTS else ",") if part.strip())
    if not values:
        raise ConfigError(f"no values for {what}; write some, with {'a |' if what in TEXTS else 'commas'} between")
    return GridAxis(what=what, values=values, of=of)


def parse_axis(text: str) -> GridAxis:
    """Parse `weight:neon=0,0.5,1` or `seed=1,2`. Raises ConfigError."""
    found = re.fullmatch(r"(?P<what>[^:=]+)(?::(?P<of>[^=]+))?=(?P<values>.*)", text, re.DOTALL)
    if not found:
        raise ConfigError(f"{text!r}: expected WHAT=VALUES or WHAT:ADAPTER=VALUES, e.g. weight:neon=0,0.5,1")
    return make_axis(found["what"], found["values"], found["of"] or "")


def format_axis(side: GridAxis) -> str:
    """Format an axis as `parse_axis` reads it."""
    what = "block-preset" if side.what == "block preset" else side.what
    between = "|" if side.what in TEXTS else ","
    return f"{what}{side.of and ':'}{side.of}={between.join(side.values)}"


def expand_grid(request: GenerationRequest, across: GridAxis, down: GridAxis) -> list[list[GenerationRequest]]:
    """Return the request of each picture, row by row. Raises ConfigError for an invalid value."""
    count = len(across.values) * len(down.values)
    if count > _MOST_CELLS:
        raise ConfigError(f"{count} pictures are more than a grid holds; {_MOST_CELLS} at most")
    single = replace(request, settings=request.settings.model_copy(update={"count": 1}))
    return [
        [_apply_axis_value(_apply_axis_value(single, down, y), across, x) for x in across.values] for y in down.values
    ]


def _apply_axis_value(request: GenerationRequest, side: GridAxis, value: str) -> GenerationRequest:
    """Return the request with this value. Raises ConfigError."""
    try:
        return CHANGES[side.what](request, value, side.of)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{side.what}: {value!r} is no number; write values like 0, 0.5, 1") from None


def _set_setting(name: str) -> Callable[[GenerationRequest, str, str], GenerationRequest]:
    """A setting of the picture."""

    def change(request: GenerationRequest, value: str, _of: str) -> GenerationRequest:
        whole = name in ("seed", "num_inference_steps")
        number = float(value) if name == "guidance_scale" else int(value) if whole else value
        settings = validate(GenerateConfig, {**request.settings.model_dump(), name: number}, source="the grid")
        return replace(request, settings=settings)

    return change


def _set_weight(
    update: Callable[[str], Mapping[str, Any]],
) -> Callable[[GenerationRequest, str, str], GenerationRequest]:
    """A change of one adapter's weight."""

    def change(request: GenerationRequest, value: str, of: str) -> GenerationRequest:
        at = find_entry(request.entries, of)
        weight = validate(
            BlendWeight, {**_as_blend_weight(request.entries[at].weight).model_dump(), **update(value)}, source=value
        )
        return replace(request, entries=_with_weight(request.entries, at, weight))

    return change


def _keep_only(request: GenerationRequest, value: str, _of: str) -> GenerationRequest:
    """Keep a single adapter, at its weight."""
    return replace(request, entries=(request.entries[find_entry(request.entries, value)],))


def _set_mode(request: GenerationRequest, value: str, _of: str) -> GenerationRequest:
    """Set another composition mode, with its default settings."""
    return replace(request, composition=validate(Composition, {"mode": value}, source="the grid"))


CHANGES: dict[str, Callable[[GenerationRequest, str, str], GenerationRequest]] = {
    "weight": _set_weight(lambda value: {"value": float(value)}),
    "block preset": _set_weight(lambda value: {"blocks": value}),
    "adapter": _keep_only,
    "mode": _set_mode,
    **{name: _set_setting(name) for name in ("seed", "scheduler", *TEXTS)},
    **{short: _set_setting(name) for name, short in SHORT_NAMES.items()},
    NOTHING: lambda request, _, __: request,
}


def find_entry(entries: Sequence[BlendEntry], of: str) -> int:
    """Find an entry by its number from 1, its file name, or the end of its path. Raises ConfigError."""
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


def _as_blend_weight(weight: Weight) -> BlendWeight:
    """Return a plain number as a BlendWeight."""
    return weight if isinstance(weight, BlendWeight) else BlendWeight(value=weight)


def _with_weight(entries: tuple[BlendEntry, ...], at: int, weight: BlendWeight) -> tuple[BlendEntry, ...]:
    """The entries with another weight for one; a weight that is no more than a number is one."""
    plain = weight.value if weight == BlendWeight(value=weight.value) else weight
    return (*entries[:at], entries[at].model_copy(update={"weight": plain}), *entries[at + 1 :])


def without_blocks(
    request: GenerationRequest, of: str, layout: ModelLayout, presets: BlockPresets | None = None
) -> dict[str, GenerationRequest]:
    """Return a request without each block of one adapter, by block, and with all under "". Raises ConfigError."""
    single = replace(request, settings=request.settings.model_copy(update={"count": 1}))
    at = find_entry(request.entries, of)
    weight = _as_blend_weight(expand_block_preset(request.entries[at].weight, layout, presets))
    factors = dict(weight.blocks) if isinstance(weight.blocks, Mapping) else {}
    _, attentive = vector_block_names(layout)
    found = {"": single}
    for block in attentive:
        less = weight.model_copy(update={"blocks": {**factors, block: 0.0}})
        found[block] = replace(single, entries=_with_weight(request.entries, at, less))
    return found
