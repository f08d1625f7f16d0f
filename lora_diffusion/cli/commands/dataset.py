"""The command that looks at training data: dataset check."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Changes, parse_changes, quiet_libraries
from lora_diffusion.config.settings import EMBEDDED_BASE, deep_merge, validate


@dataclass(frozen=True, kw_only=True)
class Check:
    """Look at a folder of training data as training does: pictures, captions, buckets, and what may go wrong."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Pictures with captions."""
    base: str = EMBEDDED_BASE
    """Base that they are for: its resolution and its tokens."""
    trigger: str = ""
    """Word that every caption should have."""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="")] = None
    """Picture to write: all pictures, cut as training cuts them, with their captions."""
    set: Changes = ()
    """Change one setting of the data section of a run, such as resolution=768."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON."""

    def run(self) -> None:
        from lora_diffusion.config.train import DataConfig

        config = validate(
            DataConfig, deep_merge({"folder": self.folder}, parse_changes(self.set)), source="dataset check"
        )
        with quiet_libraries():
            from lora_diffusion.data.checks import format_report, to_json
            from lora_diffusion.workflows.training.dataset_check import check_dataset_for_base, save_contact_sheet

            report = check_dataset_for_base(config, self.base, self.trigger)
            if self.sheet:
                save_contact_sheet(report, config, self.sheet)
        print(json.dumps(to_json(report)) if self.json else format_report(report))
