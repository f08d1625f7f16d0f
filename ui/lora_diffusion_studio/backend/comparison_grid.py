"""XY grids over two settings, and the effect of each block of an adapter on the image."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diffusion.adapters.coefficients import expand_block_preset
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.workflows.images.grid import BlockEffect, rank_blocks, save_sheet
from lora_diffusion.workflows.images.grid_axes import NOTHING, GridAxis, expand_grid, format_axis, without_blocks
from lora_diffusion.workflows.images.request import GenerationRequest
from lora_diffusion_studio.backend.device_queue import Stopped
from lora_diffusion_studio.backend.generation import Event, GenerationDone, ImageSaved, StepDone, run_request
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.blend_form import BlendForm


@dataclass(frozen=True, kw_only=True)
class GridDone:
    """A finished grid."""

    path: Path


def render_grid(
    studio: Studio, form: BlendForm, x_axis: GridAxis, y_axis: GridAxis, session_id: str = ""
) -> Iterator[Event | GridDone]:
    """Generate every image of a grid, then the grid, which carries its recipe.

    Each image is a task of its own on the device queue, so that other users do not wait for the whole grid.

    Raises:
        LoRADiffusionError: If a cell of the grid is invalid (before the first image), or generation fails.
    """
    rows = expand_grid(studio.make_request(_enable_compared(form, x_axis, y_axis)), x_axis, y_axis)
    cells = [cell for row in rows for cell in row]
    for cell in cells:
        _check_blocks(cell)
    requests = {f"Image {number} of {len(cells)}": cell for number, cell in enumerate(cells, start=1)}
    paths: list[Path] = []
    for event in _run_requests(studio, requests, session_id):
        if isinstance(event, ImageSaved):
            paths.append(event.path)
        yield event
    if len(paths) == len(requests):
        width = len(x_axis.values)
        path_rows = [paths[start : start + width] for start in range(0, len(paths), width)]
        yield GridDone(path=save_sheet(path_rows, x_axis, y_axis, studio.config.output))


def _enable_compared(form: BlendForm, x_axis: GridAxis, y_axis: GridAxis) -> BlendForm:
    """Return the form with all slots enabled if single adapters are compared."""
    compares_adapters = "adapter" in (x_axis.what, y_axis.what)
    return replace(form, slots=tuple(replace(slot, enabled=slot.enabled or compares_adapters) for slot in form.slots))


def _check_blocks(request: GenerationRequest) -> None:
    """Raise ConfigError if the base model lacks one of the blocks."""
    layout = find_checkpoint(request.base).layout
    for entry in request.entries:
        expand_block_preset(entry.weight, layout)


def _run_requests(studio: Studio, requests: Mapping[str, GenerationRequest], session_id: str) -> Iterator[Event]:
    """Run requests of one image each until one is stopped; the keys label their progress."""
    for number, (label, request) in enumerate(requests.items()):
        for event in run_request(studio, request, session_id):
            if isinstance(event, StepDone):
                fraction = (number + event.fraction) / len(requests)
                yield replace(event, text=f"{label}: {event.text}", fraction=fraction)
            elif not isinstance(event, GenerationDone):
                yield event
            if isinstance(event, Stopped):
                return


def measure_block_effects(
    studio: Studio, form: BlendForm, name: str, session_id: str = ""
) -> Iterator[Event | tuple[BlockEffect, ...]]:
    """Generate the image without each block of an adapter in turn. The last event has all blocks, strongest first.

    Raises:
        ConfigError: If no adapter is chosen, or it is not part of the blend.
    """
    if not name:
        raise ConfigError("choose an adapter of the blend")
    requests = without_blocks(studio.make_request(form), name, find_checkpoint(form.base).layout)
    labeled = {f"Without {block}" if block else "All blocks": request for block, request in requests.items()}
    paths: list[Path] = []
    for event in _run_requests(studio, labeled, session_id):
        if isinstance(event, ImageSaved):
            paths.append(event.path)
        yield event
    if len(paths) == len(requests):
        yield rank_blocks(dict(zip(requests, paths, strict=True)))


def format_comparison_commands(
    studio: Studio, form: BlendForm, x_axis: GridAxis, y_axis: GridAxis, adapter: str
) -> str:
    """Return the command of the grid and, if an adapter is given, the command that measures its blocks.

    Raises:
        ConfigError: If a weight can be stored in a preset only.
    """
    single = replace(form, settings={**form.settings, "count": 1})
    y_flags = ["--down", format_axis(y_axis)] if y_axis.what != NOTHING else []
    commands = [("grid", "--across", format_axis(x_axis), *y_flags)]
    if adapter:
        commands.append(("blocks", "--of", adapter))
    return "\n".join(studio.format_command(single, *words) for words in commands)
