"""All plots of an analysis into a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.core.atomic_files import check_writable
from lora_diffusion.errors import OutputError
from lora_diffusion.evaluation.overlap_plot import save_block_overlap_plot, save_overlap_plot
from lora_diffusion.evaluation.rank_plot import save_rank_plot
from lora_diffusion.evaluation.similarity_plot import save_similarity_plot
from lora_diffusion.evaluation.spectrum_plot import save_spectrum_plot

ALONE = ("spectrum.png", "effective_rank.png")
TOGETHER = ("similarity.png", "overlap.png", "overlap_by_block.png")


def check_plots_free(folder: Path, count: int, *, force: bool = False) -> None:
    """Raise OutputError now, before the work, if a plot of `count` adapters cannot be written.

    One that is there is replaced with `force` only.
    """
    for name in (*ALONE, *(TOGETHER if count > 1 else ())):
        if (folder / name).exists() and not force:
            raise OutputError(f"{folder / name}: already there; give another folder, or --force to replace it")
    check_writable(folder / ALONE[0])


def save_analysis_plots(facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what `analyze_files` found; returns the files. Raises OutputError.

    phi is drawn for the two adapters that share most.
    """
    adapters, pairs = facts["adapters"], facts["pairs"]
    draw: dict[str, Callable[[Path], None]] = {
        "spectrum.png": lambda path: save_spectrum_plot(adapters, path),
        "effective_rank.png": lambda path: save_rank_plot(adapters, path),
    }
    comparable = [pair for pair in pairs if pair["input"]]
    if comparable:
        closest = max(comparable, key=lambda pair: pair["shared"])
        draw["similarity.png"] = lambda path: save_similarity_plot(closest, path)
    if pairs:
        draw["overlap.png"] = lambda path: save_overlap_plot(facts, path)
        draw["overlap_by_block.png"] = lambda path: save_block_overlap_plot(pairs, path)
    for name, save in draw.items():
        save(folder / name)
    return [folder / name for name in draw]
