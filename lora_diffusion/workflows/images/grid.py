"""Image grids over two settings, and the effect of each block of an adapter on an image."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from lora_diffusion.adapters.coefficients import read_block_presets
from lora_diffusion.config.generate import LoadConfig
from lora_diffusion.core.atomic_files import atomic_file, check_writable
from lora_diffusion.evaluation.image_grid import draw_image_grid
from lora_diffusion.inference.composition import check_composition
from lora_diffusion.library.recipe import PNG_KEY
from lora_diffusion.library.references import AdapterResolver, ResolvedBlend
from lora_diffusion.models.load import Base
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.workflows.images.generate import (
    load_and_resolve_blend,
    load_base_for,
    next_image_path,
    write_images,
)
from lora_diffusion.workflows.images.grid_axes import GridAxis, expand_grid, without_blocks
from lora_diffusion.workflows.images.request import GenerationRequest, resolve_prompt_tags

_MIN_CELL_PX, _MAX_CELL_PX = 192, 512
GRID_KEY = "lora_diffusion_grid"
"""Key of the PNG text chunk with the axes of a grid and the recipe of each image."""


@dataclass(frozen=True, kw_only=True)
class BlockEffect:
    """The effect of one block of an adapter."""

    block: str
    """Name of the block, such as `IN04`."""
    change: float
    """Mean absolute difference of the pixels to the image with all blocks, 0..255."""
    path: Path
    """The image without the block."""


@dataclass(frozen=True, kw_only=True)
class RenderedGrid:
    """An image grid that was written."""

    path: Path
    """The PNG file of the grid."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""


def draw_grid(
    request: GenerationRequest,
    across: GridAxis,
    down: GridAxis,
    output: str | os.PathLike[str],
    load: LoadConfig | None = None,
    resolver: AdapterResolver | None = None,
) -> RenderedGrid:
    """Generate the images of a grid and draw them as one labeled image.

    Args:
        request: What all images have in common.
        across: The setting that changes from column to column.
        down: The setting that changes from row to row.
        output: Folder for the images; the grid is written to its subfolder `grids`.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.

    Raises:
        LoRADiffusionError: If an input is invalid; all cells are checked before the first image is generated.
    """
    load, output = load or LoadConfig(), Path(output)
    resolver = resolver or AdapterResolver(library_folder=load.library)
    check_writable(output / "00000.png")
    rows = expand_grid(resolve_prompt_tags(request, resolver), across, down)
    blends = [[load_and_resolve_blend(cell.base, cell.entries, load, resolver) for cell in row] for row in rows]
    for cell, resolved in zip(chain.from_iterable(rows), chain.from_iterable(blends), strict=True):
        check_composition(resolved.blend, cell.composition)
    base = load_base_for(request)
    notes: list[str] = list(request.notes)
    paths: list[list[Path]] = []
    with tqdm(total=len(across.values) * len(down.values), desc="grid", unit="picture", leave=False) as bar:
        for row, row_blends in zip(rows, blends, strict=True):
            paths.append([])
            for cell, resolved in zip(row, row_blends, strict=True):
                paths[-1].append(_draw_cell(base, resolved, cell, output, load, notes))
                bar.update()
    return RenderedGrid(path=save_sheet(paths, across, down, output), notes=tuple(dict.fromkeys(notes)))


def _draw_cell(
    base: Base, resolved: ResolvedBlend, cell: GenerationRequest, output: Path, load: LoadConfig, notes: list[str]
) -> Path:
    """Generate the image of one cell, and append its notes to `notes`."""
    images = write_images(base, resolved, cell, output, load, on_image=lambda _path, _picture: None)
    notes += images.notes
    return images.paths[0]


def save_sheet(
    rows: Sequence[Sequence[str | os.PathLike[str]]], across: GridAxis, down: GridAxis, output: str | os.PathLike[str]
) -> Path:
    """Draw generated images as one labeled image that contains the axes and all recipes.

    Args:
        rows: The PNG files, which must have recipes, row by row.
        across: The setting that changes from column to column.
        down: The setting that changes from row to row.
        output: Folder; the grid is written to its subfolder `grids`.

    Returns:
        The path of the grid.

    Raises:
        OutputError: If the grid cannot be written.
    """
    opened = [[_open_image(Path(path)) for path in row] for row in rows]
    pictures = [[picture for picture, _ in row] for row in opened]
    side_px = min(_MAX_CELL_PX, max(_MIN_CELL_PX, *pictures[0][0].size))
    sheet = draw_image_grid(pictures, columns=across.labels, labels=down.labels, cell_px=side_px)
    record = {
        "across": asdict(across),
        "down": asdict(down),
        "pictures": [[Path(path).name for path in row] for row in rows],
        "recipes": [[recipe for _, recipe in row] for row in opened],
    }
    texts = PngImagePlugin.PngInfo()
    texts.add_text(GRID_KEY, json.dumps(record))
    path = next_image_path(Path(output) / "grids")
    with atomic_file(path) as part:
        sheet.save(part, format="PNG", pnginfo=texts)
    return path


def _open_image(path: Path) -> tuple[Image.Image, str]:
    """Open a generated image, with its recipe as JSON."""
    with Image.open(path) as opened:
        return opened.convert("RGB"), opened.info[PNG_KEY]


def measure_blocks(
    request: GenerationRequest,
    of: str,
    output: str | os.PathLike[str],
    load: LoadConfig | None = None,
    resolver: AdapterResolver | None = None,
) -> tuple[BlockEffect, ...]:
    """Measure the effect of each block of an adapter by generating an image without it.

    Args:
        request: The image to generate.
        of: File name or number of the adapter; empty for the first.
        output: Folder for the images.
        load: How adapters are found and the blend is prepared.
        resolver: Finds adapters by path, hash or name; by default in the library of `load`.

    Returns:
        The blocks with the largest change first.

    Raises:
        LoRADiffusionError: If an input is invalid or the folder cannot be written.
    """
    load, output = load or LoadConfig(), Path(output)
    resolver = resolver or AdapterResolver(library_folder=load.library)
    check_writable(output / "00000.png")
    presets = read_block_presets(load.block_presets) if load.block_presets else None
    requests = without_blocks(resolve_prompt_tags(request, resolver), of, find_checkpoint(request.base).layout, presets)
    base = load_base_for(request)
    paths: dict[str, Path] = {}
    for block, partial in tqdm(requests.items(), desc="blocks", unit="picture", leave=False):
        resolved = load_and_resolve_blend(partial.base, partial.entries, load, resolver)
        paths[block] = _draw_cell(base, resolved, partial, output, load, [])
    return rank_blocks(paths)


def rank_blocks(paths: Mapping[str, str | os.PathLike[str]]) -> tuple[BlockEffect, ...]:
    """Rank blocks by the difference between the images without them and the image with all blocks.

    Args:
        paths: The image without each block, by name of the block, and the image with all blocks under the empty name.

    Returns:
        The blocks with the largest change first.
    """
    effects = (_measure_block_effect(block, Path(path), Path(paths[""])) for block, path in paths.items() if block)
    return tuple(sorted(effects, key=lambda effect: -effect.change))


def _measure_block_effect(block: str, without: Path, complete: Path) -> BlockEffect:
    partial, full = (np.asarray(_open_image(path)[0], dtype=np.float32) for path in (without, complete))
    return BlockEffect(block=block, change=float(np.abs(partial - full).mean()), path=without)
