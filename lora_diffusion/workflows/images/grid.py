"""Grids of pictures over two settings, and what each block of an adapter does to a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from lora_diffusion.adapters.coefficients import read_block_presets
from lora_diffusion.core.atomic_files import atomic_file, check_writable
from lora_diffusion.evaluation.image_grid import draw_image_grid
from lora_diffusion.inference.composition import check_composition
from lora_diffusion.library.recipe import PNG_KEY
from lora_diffusion.library.references import ResolvedBlend
from lora_diffusion.models.load import Base
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.workflows.images.generate import (
    LoadOptions,
    load_and_resolve_blend,
    load_base_for,
    next_image_path,
    write_images,
)
from lora_diffusion.workflows.images.grid_axes import GridAxis, expand_grid, without_blocks
from lora_diffusion.workflows.images.request import GenerationRequest, resolve_prompt_tags

_LEAST_CELL_PX, _MOST_CELL_PX = 192, 512
GRID_KEY = "lora_diffusion_grid"
"""Text entry of a grid's PNG: its axes, and the recipe of each picture."""


@dataclass(frozen=True, kw_only=True)
class BlockEffect:
    """The effect of one block of an adapter."""

    block: str
    change: float
    """Mean absolute difference of pixels to the picture with all blocks, 0..255."""
    path: Path


@dataclass(frozen=True, kw_only=True)
class RenderedGrid:
    """A finished grid, with notes for the user."""

    path: Path
    notes: tuple[str, ...] = ()


def draw_grid(
    request: GenerationRequest, across: GridAxis, down: GridAxis, output: Path, options: LoadOptions | None = None
) -> RenderedGrid:
    """Every picture of the grid into `output`, and the grid into its folder `grids`.

    All mistakes are found before the first picture. Raises LoRADiffusionError's children.
    """
    options = options or LoadOptions()
    check_writable(output / "00000.png")
    rows = expand_grid(resolve_prompt_tags(request, options.resolver), across, down)
    found = [[load_and_resolve_blend(cell.base, cell.entries, options) for cell in row] for row in rows]
    for cell, blend in zip(chain.from_iterable(rows), chain.from_iterable(found), strict=True):
        check_composition(blend.blend, cell.composition)
    base = load_base_for(request)
    notes: list[str] = list(request.notes)
    paths: list[list[Path]] = []
    with tqdm(total=len(across.values) * len(down.values), desc="grid", unit="picture", leave=False) as bar:
        for line, blends in zip(rows, found, strict=True):
            paths.append([])
            for cell, blend in zip(line, blends, strict=True):
                paths[-1].append(_draw_cell(base, blend, cell, output, options, notes))
                bar.update()
    return RenderedGrid(path=save_sheet(paths, across, down, output), notes=tuple(dict.fromkeys(notes)))


def _draw_cell(
    base: Base, blend: ResolvedBlend, cell: GenerationRequest, output: Path, options: LoadOptions, notes: list[str]
) -> Path:
    """Generate the picture of one cell, and collect notes."""
    written = write_images(base, blend, cell, output, options, on_picture=lambda _path, _picture: None)
    notes += written.notes
    return written.paths[0]


def save_sheet(rows: Sequence[Sequence[Path]], across: GridAxis, down: GridAxis, output: Path) -> Path:
    """Pictures of ours as one labeled picture, which has the axes and their recipes in it. Raises OutputError."""
    read = [[_open_image(path) for path in row] for row in rows]
    pictures = [[picture for picture, _ in row] for row in read]
    side_px = min(_MOST_CELL_PX, max(_LEAST_CELL_PX, *pictures[0][0].size))
    sheet = draw_image_grid(pictures, columns=across.labels, labels=down.labels, cell_px=side_px)
    facts = {
        "across": asdict(across),
        "down": asdict(down),
        "pictures": [[picture.name for picture in row] for row in rows],
        "recipes": [[recipe for _, recipe in row] for row in read],
    }
    texts = PngImagePlugin.PngInfo()
    texts.add_text(GRID_KEY, json.dumps(facts))
    path = next_image_path(output / "grids")
    with atomic_file(path) as part:
        sheet.save(part, format="PNG", pnginfo=texts)
    return path


def _open_image(path: Path) -> tuple[Image.Image, str]:
    """Open one of our pictures with its recipe."""
    with Image.open(path) as opened:
        return opened.convert("RGB"), opened.info[PNG_KEY]


def measure_blocks(
    request: GenerationRequest, of: str, output: Path, options: LoadOptions | None = None
) -> tuple[BlockEffect, ...]:
    """Leave out one block of an adapter at a time; the strongest first. Raises LoRADiffusionError's children."""
    options = options or LoadOptions()
    check_writable(output / "00000.png")
    presets = read_block_presets(options.block_presets) if options.block_presets else None
    plans = without_blocks(
        resolve_prompt_tags(request, options.resolver), of, find_checkpoint(request.base).layout, presets
    )
    base = load_base_for(request)
    paths: dict[str, Path] = {}
    for block, less in tqdm(plans.items(), desc="blocks", unit="picture", leave=False):
        paths[block] = _draw_cell(
            base, load_and_resolve_blend(less.base, less.entries, options), less, output, options, []
        )
    return rank_blocks(paths)


def rank_blocks(paths: Mapping[str, Path]) -> tuple[BlockEffect, ...]:
    """Rank blocks by how much each picture differs from the one with all blocks, which is under ""."""
    effects = (_measure_block_effect(block, path, paths[""]) for block, path in paths.items() if block)
    return tuple(sorted(effects, key=lambda effect: -effect.change))


def _measure_block_effect(block: str, without: Path, whole: Path) -> BlockEffect:
    less, more = (np.asarray(_open_image(path)[0], dtype=np.float32) for path in (without, whole))
    return BlockEffect(block=block, change=float(np.abs(less - more).mean()), path=without)
