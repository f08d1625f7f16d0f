"""Grids over any two settings, and which block of an adapter changes a picture how much, picture by picture."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diffusion.adapters.coefficients import expand_block_preset
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.workflows.images.grid import BlockEffect, rank_blocks, save_sheet
from lora_diffusion.workflows.images.grid_axes import NOTHING, GridAxis, expand_grid, format_axis, without_blocks
from lora_diffusion.workflows.images.request import GenerationRequest
from lora_diffusion_studio.backend.device_queue import Halted
from lora_diffusion_studio.backend.studio import Event, Finished, ImageSaved, StepTaken, Studio
from lora_diffusion_studio.view_models.blend_form import BlendForm


@dataclass(frozen=True, kw_only=True)
class GridDone:
    """A finished grid."""

    path: Path


def render_grid(
    studio: Studio, form: BlendForm, across: GridAxis, down: GridAxis, visitor: str = ""
) -> Iterator[Event | GridDone]:
    """Render every picture of the grid, then the grid, which carries its recipe.

    Raises LoRADiffusionError's children.

    Each picture takes its own turn on the device, so that a long grid holds nobody up.
    """
    rows = expand_grid(studio.make_request(include_disabled(form, across, down)), across, down)
    for cell in (cell for row in rows for cell in row):  # all mistakes before the first picture
        check_blocks(cell)
    count = len(across.values) * len(down.values)
    numbered = enumerate((cell for row in rows for cell in row), start=1)
    flat = {f"picture {number} of {count}": cell for number, cell in numbered}
    paths: list[Path] = []
    for event in run_in_turn(studio, flat, visitor):
        if isinstance(event, ImageSaved):
            paths.append(event.path)
        yield event
    if len(paths) == len(flat):
        width = len(across.values)
        lines = [paths[start : start + width] for start in range(0, len(paths), width)]
        yield GridDone(path=save_sheet(lines, across, down, studio.places.output))


def include_disabled(form: BlendForm, across: GridAxis, down: GridAxis) -> BlendForm:
    """Return the form; when single adapters are compared, disabled ones count too."""
    one_by_one = "adapter" in (across.what, down.what)
    return replace(form, rows=tuple(replace(row, on=row.on or one_by_one) for row in form.rows))


def check_blocks(request: GenerationRequest) -> None:
    """Raise ConfigError for a block preset that the base does not know."""
    layout = find_checkpoint(request.base).layout
    for entry in request.entries:
        expand_block_preset(entry.weight, layout)


def run_in_turn(studio: Studio, plans: dict[str, GenerationRequest], visitor: str) -> Iterator[Event]:
    """Run several requests that make one picture each, as one task, until stopped."""
    for number, (name, request) in enumerate(plans.items()):
        for event in studio.render_request(request, visitor):
            if isinstance(event, StepTaken):
                share = (number + event.share) / len(plans)
                yield replace(event, text=f"{name}: {event.text}", share=share)
            elif not isinstance(event, Finished):
                yield event
            if isinstance(event, Halted):
                return


def measure_block_effects(
    studio: Studio, form: BlendForm, name: str, visitor: str = ""
) -> Iterator[Event | tuple[BlockEffect, ...]]:
    """Drop one block of an adapter at a time; the last event has all blocks, the strongest first."""
    if not name:
        raise ConfigError("choose an adapter that is on the table")
    plans = without_blocks(studio.make_request(form), name, find_checkpoint(form.base).layout)
    paths: list[Path] = []
    for event in run_in_turn(
        studio, {f"without {block}" if block else "whole": request for block, request in plans.items()}, visitor
    ):
        if isinstance(event, ImageSaved):
            paths.append(event.path)
        yield event
    if len(paths) == len(plans):
        yield rank_blocks(dict(zip(plans, paths, strict=True)))


def compare_commands(studio: Studio, form: BlendForm, across: GridAxis, down: GridAxis, of: str) -> str:
    """The same grid on the command line, and below it the same block analysis, of an adapter. Raises ConfigError."""
    single = replace(form, settings={**form.settings, "count": 1})
    asked = [
        ("grid", "--across", format_axis(across), *(["--down", format_axis(down)] if down.what != NOTHING else []))
    ]
    asked += [("blocks", "--of", of)] * bool(of)
    return "\n".join(studio.format_command(single, *words) for words in asked)
