"""The command that looks into adapters: analyze."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Patterns, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Show what adapters are made of and how much they will fight: ranks, directions, overlap."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")]
    """Adapter files, or folders that PEFT saved; of one family."""
    base: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = ""
    """Base to compare them with, which DoRA needs: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    plots: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Draw pictures into this folder."""
    force: bool = False
    """Replace pictures that are there."""
    ignore_unmatched: Patterns = ()
    """Keys that may be there without being understood."""
    json: bool = False
    """Print everything, module by module, as JSON."""

    def run(self) -> int:
        from lora_diffusion.evaluation.plots import check_plots_free, save_analysis_plots
        from lora_diffusion.workflows.adapters.analyze import analyze_files
        from lora_diffusion.workflows.adapters.analyze_report import describe_analysis

        if self.plots:
            check_plots_free(self.plots, len(self.files), force=self.force)
        with quiet_libraries():
            facts = analyze_files(self.files, base=self.base, ignore=self.ignore_unmatched)
        drawn = save_analysis_plots(facts, self.plots) if self.plots else []
        if self.json:
            print(json.dumps({**facts, "plots": [str(path) for path in drawn]}))
        else:
            print("\n".join([describe_analysis(facts), *(f"drawn: {path}" for path in drawn)]))
        return 0
