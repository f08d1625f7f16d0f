"""The command `prune`, which sets the smallest entries of an adapter to zero."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Switch, given_settings, optional_flags
from lora_diffusion.config.adapter_files import PruneConfig
from lora_diffusion.config.settings import validate


class PruneFlags(optional_flags(PruneConfig)):
    """Flags of the pruning settings."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Set the smallest entries of an adapter to zero (magnitude pruning).

    Example: `lora-diffusion prune lora.safetensors pruned.safetensors --keep 0.5`

    The file does not get smaller, because zeros are stored like other numbers; use `resize` for that. A pruned delta
    (--what delta) no longer has a low rank and is stored in full, which makes the file many times larger.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN", help_behavior_hint="")]
    """Adapter to read, in any dialect."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    settings: Annotated[PruneFlags, tyro.conf.arg(name="")]
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        config = validate(PruneConfig, given_settings(self.settings), source="prune")
        from lora_diffusion.workflows.adapters.prune import format_report, prune_file, to_json

        done = prune_file(self.source, self.output, config)
        print(json.dumps(to_json(done)) if self.json else format_report(done))
        return 0
