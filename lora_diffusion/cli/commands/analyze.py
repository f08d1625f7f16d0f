"""The command `analyze`, which measures adapters and their overlap."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import IgnoreUnmatched, Switch, describe_base_flag, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Measure adapters and how strongly they interfere: norms, effective ranks, shared directions."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")]
    """Adapter files, or folders that PEFT saved; all for the same family of base models."""
    base: Annotated[str, describe_base_flag("Base model to compare the adapters with, needed for DoRA", hint="")] = ""
    plots: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Also draw plots into this folder."""
    force: Switch = False
    """Replace existing plots."""
    ignore_unmatched: IgnoreUnmatched = ()
    json: Switch = False
    """Print all measurements, module by module, as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        from lora_diffusion.evaluation.plots import check_plots_free, save_analysis_plots
        from lora_diffusion.workflows.adapters.analyze import analyze_files
        from lora_diffusion.workflows.adapters.analyze_report import describe_analysis

        if self.plots:
            check_plots_free(self.plots, len(self.files), force=self.force)
        with quiet_libraries():
            facts = analyze_files(self.files, base=self.base, ignore=self.ignore_unmatched)
        plots = save_analysis_plots(facts, self.plots) if self.plots else []
        if self.json:
            print(json.dumps({**facts, "plots": [str(path) for path in plots]}))
        else:
            print("\n".join([describe_analysis(facts), *(f"plot: {path}" for path in plots)]))
        return 0
