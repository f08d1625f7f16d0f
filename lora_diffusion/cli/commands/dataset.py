"""The command `dataset check`, which inspects training data."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Changes, Switch, describe_flag, parse_changes, quiet_libraries, setting_help
from lora_diffusion.config.defaults import QuickTrainConfig
from lora_diffusion.config.generate import BaseConfig
from lora_diffusion.config.settings import EMBEDDED_BASE, deep_merge, validate


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check a folder of training data as training reads it: images, captions, buckets, and likely problems."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Folder of images with captions."""
    base: Annotated[str, describe_flag(BaseConfig, "base")] = EMBEDDED_BASE
    trigger_words: Annotated[
        str,
        tyro.conf.arg(
            metavar="WORDS",
            aliases=("--trigger",),
            help=f"{setting_help(QuickTrainConfig, 'trigger_words')} Every caption should contain them.",
            help_behavior_hint="(default: none)",
        ),
    ] = ""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="")] = None
    """Write a contact sheet: all images, cropped as for training, with their captions."""
    set: Changes = ()
    """Change one setting of a training config's [data] section, such as resolution=768."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        from lora_diffusion.config.train import DataConfig

        config = validate(
            DataConfig, deep_merge({"folder": self.folder}, parse_changes(self.set)), source="dataset check"
        )
        with quiet_libraries():
            from lora_diffusion.data.checks import format_report, to_json
            from lora_diffusion.workflows.training.dataset_check import check_dataset_for_base, save_contact_sheet

            report = check_dataset_for_base(config, self.base, self.trigger_words)
            if self.sheet:
                save_contact_sheet(report, config, self.sheet)
        print(json.dumps(to_json(report)) if self.json else format_report(report))
