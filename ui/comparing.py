"""Grids over any two settings, and which block of an adapter changes a picture how much."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from lora_diffusion.commands import free_name
from lora_diffusion.errors import ConfigError
from lora_diffusion.evaluation.grid import grid
from lora_diffusion.files import whole_file
from lora_diffusion.models import find_checkpoint
from lora_diffusion.recipe import PNG_KEY
from lora_diffusion.weights import block_layouts
from ui.forms import Form
from ui.rendering import Halted
from ui.rows import Row, told
from ui.studio import Event, Finished, Made, Step, Studio

MOST_CELLS = 64
NOTHING = "nothing"


def set_setting(name: str) -> Callable[[Form, str, str], Form]:
    """A setting of the picture."""

    def changed(form: Form, value: str, _of: str) -> Form:
        number = float(value) if name == "guidance" else int(value) if name != "prompt" else value
        return replace(form, settings={**form.settings, name: number})

    return changed


def change_row(change: Callable[[Row, str], Row]) -> Callable[[Form, str, str], Form]:
    """A change of one adapter on the table, the first if none is named."""

    def changed(form: Form, value: str, of: str) -> Form:
        if not form.rows:
            raise ConfigError("no adapter is on the table; put one there, or compare something else")
        name = of or form.rows[0].name
        if name not in [row.name for row in form.rows]:
            raise ConfigError(f"{name}: is not on the table; choose one that is")
        return replace(form, rows=tuple(change(row, value) if row.name == name else row for row in form.rows))

    return changed


def only(form: Form, value: str, _of: str) -> Form:
    """One adapter alone."""
    found = [row for row in form.rows if row.name.removesuffix(".safetensors") == value.removesuffix(".safetensors")]
    if not found:
        raise ConfigError(f"{value}: is not on the table; name adapters that are")
    return replace(form, rows=(replace(found[0], on=True),))


AXES: dict[str, Callable[[Form, str, str], Form]] = {
    "weight": change_row(lambda row, value: replace(row, weight=float(value), full="")),
    "block preset": change_row(lambda row, value: told(row, lbw=value)),
    "adapter": only,
    "mode": lambda form, value, _: replace(form, mode=value, composition={}),
    **{name: set_setting(name) for name in ("seed", "steps", "guidance", "prompt")},
    NOTHING: lambda form, _, __: form,
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What changes along one side."""

    what: str = NOTHING
    values: tuple[str, ...] = ("",)
    of: str = ""
    """Which adapter, for a weight or a block preset; the first on the table if empty."""

    def form(self, form: Form, value: str) -> Form:
        """The form with this value. Raises ConfigError."""
        try:
            return AXES[self.what](form, value.strip(), self.of)
        except ConfigError:
            raise
        except ValueError:
            raise ConfigError(f"{self.what}: {value.strip()!r} is no number; write values like 0, 0.5, 1") from None


def axis(what: str, text: str, of: str = "") -> Axis:
    """From what a visitor wrote: values with commas between, prompts with `|`. Raises ConfigError."""
    if what == NOTHING:
        return Axis()
    if what not in AXES:
        raise ConfigError(f"{what!r} cannot be compared; choose one of {', '.join(AXES)}")
    values = tuple(part.strip() for part in text.split("|" if what == "prompt" else ",") if part.strip())
    if not values:
        raise ConfigError(f"no values for {what}; write some, with commas between")
    return Axis(what=what, values=values, of=of)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A finished grid."""

    path: Path


def compared(studio: Studio, form: Form, across: Axis, down: Axis, visitor: str = "") -> Iterator[Event | Sheet]:
    """Every picture of the grid, then the grid, which carries how it was made. Raises LoRADiffusionError's children."""
    count = len(across.values) * len(down.values)
    if count > MOST_CELLS:
        raise ConfigError(f"{count} pictures are more than a grid holds; {MOST_CELLS} at most")
    single = replace(form, settings={**form.settings, "count": 1})
    forms = [[across.form(down.form(single, y), x) for x in across.values] for y in down.values]
    for row in forms:  # all mistakes before the first picture
        for cell in row:
            studio.plan(cell)
    rows: list[list[Path]] = []
    for line, row in enumerate(forms):
        rows.append([])
        for number, cell in enumerate(row):
            for event in studio.render(cell, visitor):
                if isinstance(event, Step):
                    place = line * len(row) + number
                    share = (place + event.share) / count
                    yield replace(event, text=f"picture {place + 1} of {count}, {event.text}", share=share)
                elif isinstance(event, Made):
                    rows[-1].append(event.path)
                    yield event
                else:
                    yield event
                if isinstance(event, Halted):
                    return
    yield Sheet(path=save_sheet(studio, rows, across, down))


def save_sheet(studio: Studio, rows: Sequence[Sequence[Path]], across: Axis, down: Axis) -> Path:
    """The labelled picture, with the axes and each picture's name in it."""
    read = [[seen(path) for path in row] for row in rows]
    pictures = [[picture for picture, _ in row] for row in read]
    columns = [label(across, value) for value in across.values]
    sheet = grid(pictures, columns=columns, labels=[label(down, value) for value in down.values])
    folder = studio.places.output / "grids"
    path = free_name(folder)
    facts = {
        "across": vars(across),
        "down": vars(down),
        "pictures": [[picture.name for picture in row] for row in rows],
        "recipes": [[recipe for _, recipe in row] for row in read],
    }
    texts = PngImagePlugin.PngInfo()
    texts.add_text("lora_diffusion_grid", json.dumps(facts))
    with whole_file(path) as part:
        sheet.save(part, format="PNG", pnginfo=texts)
    return path


def seen(path: Path) -> tuple[Image.Image, str]:
    """A picture of ours and its recipe."""
    with Image.open(path) as opened:
        return opened.convert("RGB"), opened.info[PNG_KEY]


def label(axis: Axis, value: str) -> str:
    return "" if axis.what == NOTHING else f"{axis.what} {value}" if axis.what != "prompt" else value


@dataclass(frozen=True, kw_only=True)
class BlockEffect:
    """What is lost without one block of an adapter."""

    block: str
    change: float
    """Mean absolute difference of pixels to the whole adapter's picture, 0..255."""
    path: Path


def without_blocks(studio: Studio, form: Form, name: str, visitor: str = "") -> Iterator[Event | list[BlockEffect]]:
    """Drop one block at a time; the last event has all of them, the strongest first."""
    if name not in [row.name for row in form.rows]:
        raise ConfigError(f"{name or 'no adapter'}: choose one that is on the table")
    _, blocks = block_layouts(find_checkpoint(form.base).anatomy)
    single = replace(form, settings={**form.settings, "count": 1})
    whole: np.ndarray | None = None
    found: list[BlockEffect] = []
    for number, block in enumerate(("", *blocks)):
        drop = change_row(lambda row, value: told(row, lbw="", **{value: "0"}) if value else row)
        for event in studio.render(drop(single, block, name), visitor):
            if isinstance(event, Step):
                share = (number + event.share) / (len(blocks) + 1)
                yield replace(event, text=f"{f'without {block}' if block else 'whole'}: {event.text}", share=share)
            elif isinstance(event, Made):
                pixels = np.asarray(seen(event.path)[0], dtype=np.float32)
                whole = pixels if whole is None else whole
                if block:
                    change = float(np.abs(pixels - whole).mean())
                    found.append(BlockEffect(block=block, change=change, path=event.path))
            elif not isinstance(event, Finished):
                yield event
            if isinstance(event, Halted):
                return
    yield sorted(found, key=lambda effect: -effect.change)
