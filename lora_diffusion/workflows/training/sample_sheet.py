"""Samples on the way as one picture: steps down, prompts across."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_diffusion.evaluation.image_grid import draw_image_grid, save_grid
from lora_diffusion.training.previews import SAMPLES, preview_path

_CELL_PX = 192


def sheet_path(folder: Path) -> Path:
    return folder / "samples.png"


def draw_sheet(folder: Path, prompts: Sequence[str]) -> Path | None:
    """Write the sheet of a run's folder anew; None if there are no samples."""
    steps = sorted({int(path.stem.split("-")[1]) for path in (folder / SAMPLES).glob("step-*-*.png")})
    whole = [step for step in steps if all(preview_path(folder, step, i).is_file() for i in range(len(prompts)))]
    if not whole or not prompts:
        return None
    rows = [[_open_image(preview_path(folder, step, i)) for i in range(len(prompts))] for step in whole]
    columns = [textwrap.shorten(prompt, 22, placeholder=" …") for prompt in prompts]
    labels = ["before training" if step == 0 else f"step {step}" for step in whole]
    save_grid(draw_image_grid(rows, columns=columns, labels=labels, cell_px=_CELL_PX), sheet_path(folder))
    return sheet_path(folder)


def _open_image(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")
