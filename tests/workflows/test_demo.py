"""The demo with fewer steps: it trains, blends and merges, and its measurements show that each step had an effect."""

from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import OutputError
from lora_diffusion.models.load import load_base
from lora_diffusion.workflows.demo import PROMPTS, run_demo
from train_scripts.tiny_world.reader import load_reader, read


@pytest.mark.slow
def test_short_demo_trains_blends_and_merges(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_demo(tmp_path / "demo", steps=60, print_line=lines.append)
    base, half, full, _, both = result.distances.values()
    assert max(half, full) < base
    assert both < base
    assert result.merged_exact == 0
    assert result.merged_half <= 16
    assert any("grid.png" in line for line in lines)
    with Image.open(tmp_path / "demo" / "grid.png") as sheet:
        assert sheet.width > 900
    assert load_base(str(tmp_path / "demo" / "merged")).family.name == "tiny-sd"
    cells = full_style_cells(tmp_path / "demo" / "grid.png")
    readings = read(load_reader(sample_data_folder() / "tiny-world-reader"), cells)
    recognized = [r.subject in prompt.split() for r, prompt in zip(readings, PROMPTS, strict=False)]
    assert sum(recognized) >= 2, readings


def full_style_cells(path: Path) -> list[Image.Image]:
    """Return the images of known subjects in the column of the style at weight 1."""
    from lora_diffusion.evaluation.image_grid import HEADER_PX, LABEL_PX, MARGIN_PX

    cell = 192
    left = LABEL_PX + 2 * (cell + MARGIN_PX)
    with Image.open(path) as sheet:
        tops = [HEADER_PX + row * (cell + MARGIN_PX) for row, prompt in enumerate(PROMPTS) if "gloop" not in prompt]
        boxes = [(left, top, left + cell, top + cell) for top in tops]
        return [sheet.crop(box).resize((64, 64), Image.Resampling.NEAREST) for box in boxes]


def test_other_folders_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="contains files that no demo wrote"):
        run_demo(tmp_path, steps=1, print_line=print)
    assert (tmp_path / "mine.txt").read_text() == "keep"
