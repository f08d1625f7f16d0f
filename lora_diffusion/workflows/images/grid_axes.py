"""Axes of image grids: the requests of a grid over two settings, or of a blend without one block at a time."""

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

_MAX_CELLS = 64
"""Maximum number of images in a grid."""
NOTHING = "nothing"
"""Name of an axis with a single image."""
TEXTS = ("prompt", "negative_prompt")
"""Settings whose values can contain commas, so that they are separated by `|`."""


@dataclass(frozen=True, kw_only=True)
class GridAxis:
    """The setting that changes along one side of a grid, and its values."""

    what: str = NOTHING
    """Name of the setting, a key of `CHANGES`."""
    values: tuple[str, ...] = ("",)
    """Values of the setting, as text."""
    of: str = ""
    """Adapter whose weight or block preset changes: file name, or number from 1; empty for the first adapter."""

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
    """Make an axis from text.

    Args:
        what: Name of the setting, a key of `CHANGES`.
        text: Values separated by commas; prompts are separated by `|`.
        of: Adapter whose weight or block preset changes.

    Raises:
        ConfigError: If the setting is unknown or there are no values.
    """
    what = what.strip().replace("-", "_") if what.strip() != "block-preset" else "block preset"
    if what == NOTHING:
        return GridAxis()
    if what not in CHANGES:
        raise ConfigError(f"{what!r}: is not a setting that a grid can vary; expected one of {', '.join(CHANGES)}")
    values = tuple(part.strip() for part in text.split("|" if what in TEXTS else ",") if part.strip())
    if not values:
        separator = "|" if what in TEXTS else "commas"
        raise ConfigError(f"{what}: no values; expected one or more, separated by {separator}")
    return GridAxis(what=what, values=values, of=of)


def parse_axis(text: str) -> GridAxis:
    """Parse an axis such as `weight:neon=0,0.5,1` or `seed=1,2`.

    Raises:
        ConfigError: If the text has another form, or the setting is unknown.
    """
    match = re.fullmatch(r"(?P<what>[^:=]+)(?::(?P<of>[^=]+))?=(?P<values>.*)", text, re.DOTALL)
    if not match:
        raise ConfigError(f"{text!r}: expected SETTING=VALUES or SETTING:ADAPTER=VALUES, e.g. weight:neon=0,0.5,1")
    return make_axis(match["what"], match["values"], match["of"] or "")


def format_axis(side: GridAxis) -> str:
    """Format an axis as text that `parse_axis` reads."""
    what = "block-preset" if side.what == "block preset" else side.what
    between = "|" if side.what in TEXTS else ","
    return f"{what}{side.of and ':'}{side.of}={between.join(side.values)}"


def expand_grid(request: GenerationRequest, across: GridAxis, down: GridAxis) -> list[list[GenerationRequest]]:
    """Return the request of each image of a grid.

    Args:
        request: What all images have in common.
        across: The setting that changes from column to column.
        down: The setting that changes from row to row.

    Returns:
        The requests, row by row, each for a single image.

    Raises:
        ConfigError: If a value is invalid, or the grid is too large.
    """
    count = len(across.values) * len(down.values)
    if count > _MAX_CELLS:
        raise ConfigError(f"a grid of {count} images is too large; give values for {_MAX_CELLS} at most")
    single = replace(request, settings=request.settings.model_copy(update={"count": 1}))
    return [
        [_apply_axis_value(_apply_axis_value(single, down, y), across, x) for x in across.values] for y in down.values
    ]


def _apply_axis_value(request: GenerationRequest, side: GridAxis, value: str) -> GenerationRequest:
    """Return the request with one value of an axis."""
    try:
        return CHANGES[side.what](request, value, side.of)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{side.what}: {value!r} is not a number; expected values such as 0, 0.5, 1") from None


def _set_setting(name: str) -> Callable[[GenerationRequest, str, str], GenerationRequest]:
    """Return a function that changes a sampling setting of a request."""

    def change(request: GenerationRequest, value: str, _of: str) -> GenerationRequest:
        is_integer = name in ("seed", "num_inference_steps")
        parsed = float(value) if name == "guidance_scale" else int(value) if is_integer else value
        settings = validate(GenerateConfig, {**request.settings.model_dump(), name: parsed}, source="the grid")
        return replace(request, settings=settings)

    return change


def _set_weight(
    update: Callable[[str], Mapping[str, Any]],
) -> Callable[[GenerationRequest, str, str], GenerationRequest]:
    """Return a function that changes the weight of one adapter of a request."""

    def change(request: GenerationRequest, value: str, of: str) -> GenerationRequest:
        at = find_entry(request.entries, of)
        weight = validate(
            BlendWeight, {**_as_blend_weight(request.entries[at].weight).model_dump(), **update(value)}, source=value
        )
        return replace(request, entries=_with_weight(request.entries, at, weight))

    return change


def _keep_only(request: GenerationRequest, value: str, _of: str) -> GenerationRequest:
    """Return the request with a single adapter, at its weight."""
    return replace(request, entries=(request.entries[find_entry(request.entries, value)],))


def _set_mode(request: GenerationRequest, value: str, _of: str) -> GenerationRequest:
    """Return the request with another composition mode, at its default settings."""
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
    """Find an adapter of a request.

    Args:
        entries: The adapters of the request.
        of: Number from 1, name, file name, or the end of the path, with or without its suffix; empty for the first.

    Returns:
        Index of the adapter.

    Raises:
        ConfigError: If there is no such adapter.
    """
    if not entries:
        raise ConfigError("the blend has no adapters; add one, or vary another setting")
    if not of:
        return 0
    if of.isdecimal() and 1 <= int(of) <= len(entries):
        return int(of) - 1
    wanted = Path(of)
    for index, entry in enumerate(entries):
        path = Path(entry.path)
        same_folder = path.parent.parts[len(path.parent.parts) - len(wanted.parent.parts) :] == wanted.parent.parts
        if of == entry.name or (same_folder and adapter_stem(path) == adapter_stem(wanted)):
            return index
    known = ", ".join(entry.name or adapter_stem(Path(entry.path)) for entry in entries)
    raise ConfigError(f"{of}: is not an adapter of the blend; expected one of {known}")


def _as_blend_weight(weight: Weight) -> BlendWeight:
    """Return a weight as a BlendWeight."""
    return weight if isinstance(weight, BlendWeight) else BlendWeight(value=weight)


def _with_weight(entries: tuple[BlendEntry, ...], at: int, weight: BlendWeight) -> tuple[BlendEntry, ...]:
    """Return the entries with another weight for one; a weight without further settings becomes a number."""
    plain = weight.value if weight == BlendWeight(value=weight.value) else weight
    return (*entries[:at], entries[at].model_copy(update={"weight": plain}), *entries[at + 1 :])


def without_blocks(
    request: GenerationRequest, of: str, layout: ModelLayout, presets: BlockPresets | None = None
) -> dict[str, GenerationRequest]:
    """Return requests that each leave out one block of an adapter.

    Args:
        request: The image to generate.
        of: File name or number of the adapter; empty for the first.
        layout: Layout of the base, which determines the blocks.
        presets: Block vectors by name.

    Returns:
        The requests by name of the left out block, and the unchanged request under the empty name.

    Raises:
        ConfigError: If there is no such adapter, or its block preset is unknown.
    """
    single = replace(request, settings=request.settings.model_copy(update={"count": 1}))
    at = find_entry(request.entries, of)
    weight = _as_blend_weight(expand_block_preset(request.entries[at].weight, layout, presets))
    factors = dict(weight.blocks) if isinstance(weight.blocks, Mapping) else {}
    _, attention_blocks = vector_block_names(layout)
    requests = {"": single}
    for block in attention_blocks:
        partial = weight.model_copy(update={"blocks": {**factors, block: 0.0}})
        requests[block] = replace(single, entries=_with_weight(request.entries, at, partial))
    return requests
