"""Every public function of evaluation that takes a path accepts a string, a `Path` and any other `os.PathLike`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_diffusion import evaluation
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.evaluation import (
    image_grid,
    norm_plot,
    overlap_plot,
    plot_style,
    plots,
    rank_plot,
    similarity_plot,
    spectrum_plot,
    style_distance,
)
from lora_diffusion.workflows.adapters.analyze import analyze_files
from tests.helpers.path_arguments import SPELLINGS, functions_with_paths

Facts = dict[str, Any]
FILES: dict[str, Callable[[Facts, Any], object]] = {
    "image_grid.save_grid": lambda _, path: image_grid.save_grid(Image.new("RGB", (8, 8)), path),
    "norm_plot.save_norm_plot": lambda _, path: norm_plot.save_norm_plot(
        {"unet": {"median": 1.0, "max": 2.0}}, path, title="x"
    ),
    "overlap_plot.save_overlap_plot": overlap_plot.save_overlap_plot,
    "overlap_plot.save_block_overlap_plot": lambda facts, path: overlap_plot.save_block_overlap_plot(
        facts["pairs"], path
    ),
    "plot_style.save_figure": lambda _, path: plot_style.save_figure(plot_style.new_figure(1, 1), path),
    "rank_plot.save_rank_plot": lambda facts, path: rank_plot.save_rank_plot(facts["adapters"], path),
    "similarity_plot.save_similarity_plot": lambda facts, path: similarity_plot.save_similarity_plot(
        facts["pairs"][0], path
    ),
    "spectrum_plot.save_spectrum_plot": lambda facts, path: spectrum_plot.save_spectrum_plot(facts["adapters"], path),
}
FOLDERS = {"plots.check_plots_free", "plots.save_analysis_plots", "style_distance.list_style_images"}


@pytest.fixture(scope="module")
def facts() -> Facts:
    return analyze_files([sample_data_folder() / "adapters" / f"{name}.safetensors" for name in ("ink", "neon")])


def test_every_function_with_a_path_is_tested() -> None:
    assert functions_with_paths(evaluation) == set(FILES) | FOLDERS


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_plots_are_saved_to_any_path(spelling: Callable[[Path], Any], facts: Facts, tmp_path: Path) -> None:
    for name, save in FILES.items():
        save(facts, spelling(tmp_path / f"{name}.png"))
    assert {path.stem for path in tmp_path.iterdir()} == set(FILES)
    plots.check_plots_free(spelling(tmp_path / "plots"), 2)
    files = plots.save_analysis_plots(facts, spelling(tmp_path / "plots"))
    assert len(style_distance.list_style_images(spelling(tmp_path / "plots"))) == len(files)
