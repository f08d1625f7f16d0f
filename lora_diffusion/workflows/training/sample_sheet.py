"""The sample pictures of a training run in one sheet, with a row for each step and a column for each prompt."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_diffusion.evaluation.image_grid import draw_image_grid, save_grid
from lora_diffusion.training.previews import SAMPLES, preview_path

_CELL_PX = 192


def sheet_path(folder: str | os.PathLike[str]) -> Path:
    """Return the path of the sample sheet in the folder of a run."""
    return Path(folder) / "samples.png"


def draw_sheet(folder: str | os.PathLike[str], prompts: Sequence[str]) -> Path | None:
    """Draw the sample sheet of a run and replace an earlier one.

    Args:
        folder: Folder of the run.
        prompts: The prompts of the samples. Steps without a sample of each prompt are left out.

    Returns:
        The path of the sheet; None if there are no samples.

    Raises:
        OutputError: If the sheet cannot be written.
    """
    folder = Path(folder)
    steps = sorted({int(path.stem.split("-")[1]) for path in (folder / SAMPLES).glob("step-*-*.png")})
    complete = [step for step in steps if all(preview_path(folder, step, i).is_file() for i in range(len(prompts)))]
    if not complete or not prompts:
        return None
    rows = [[_open_image(preview_path(folder, step, i)) for i in range(len(prompts))] for step in complete]
    columns = [textwrap.shorten(prompt, 22, placeholder=" …") for prompt in prompts]
    labels = ["before training" if step == 0 else f"step {step}" for step in complete]
    save_grid(draw_image_grid(rows, columns=columns, labels=labels, cell_px=_CELL_PX), sheet_path(folder))
    return sheet_path(folder)


def _open_image(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")
