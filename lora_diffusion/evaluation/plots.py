"""Write all plots of an adapter analysis to a folder."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.core.atomic_files import check_output_free, check_writable
from lora_diffusion.evaluation.overlap_plot import save_block_overlap_plot, save_overlap_plot
from lora_diffusion.evaluation.rank_plot import save_rank_plot
from lora_diffusion.evaluation.similarity_plot import save_similarity_plot
from lora_diffusion.evaluation.spectrum_plot import save_spectrum_plot

_ADAPTER_PLOTS = ("spectrum.png", "effective_rank.png")
_PAIR_PLOTS = ("similarity.png", "overlap.png", "overlap_by_block.png")


def check_plots_free(folder: str | os.PathLike[str], count: int, *, force: bool = False) -> None:
    """Check, before the analysis, that its plots can be written.

    Args:
        folder: The folder for the plots.
        count: The number of adapters; two or more have plots of pairs.
        force: Whether to replace existing files.

    Raises:
        OutputError: If a file exists and `force` is not given, or if the folder is not writable.
    """
    folder = Path(folder)
    for name in (*_ADAPTER_PLOTS, *(_PAIR_PLOTS if count > 1 else ())):
        check_output_free(folder / name, force=force)
    check_writable(folder / _ADAPTER_PLOTS[0])


def save_analysis_plots(analysis: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw the plots of an analysis.

    Spectrum and effective rank are drawn for every adapter, and overlap for two or more. The subspace similarity is
    drawn for the pair with the largest shared energy.

    Args:
        analysis: The result of `analyze_files`.
        folder: The folder for the plots.

    Returns:
        The files that were written.

    Raises:
        OutputError: If a file cannot be written.
    """
    folder = Path(folder)
    adapters, pairs = analysis["adapters"], analysis["pairs"]
    draw: dict[str, Callable[[Path], None]] = {
        "spectrum.png": lambda path: save_spectrum_plot(adapters, path),
        "effective_rank.png": lambda path: save_rank_plot(adapters, path),
    }
    comparable = [pair for pair in pairs if pair["input"]]
    if comparable:
        closest = max(comparable, key=lambda pair: pair["shared"])
        draw["similarity.png"] = lambda path: save_similarity_plot(closest, path)
    if pairs:
        draw["overlap.png"] = lambda path: save_overlap_plot(analysis, path)
        draw["overlap_by_block.png"] = lambda path: save_block_overlap_plot(pairs, path)
    for name, save in draw.items():
        save(folder / name)
    return [folder / name for name in draw]
