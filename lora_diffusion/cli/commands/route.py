"""The command `route`, which trains gates over adapters."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Changes, Switch, parse_changes, quiet_libraries, settings_table
from lora_diffusion.config.routing import RouteConfig


@dataclass(frozen=True, kw_only=True)
class Route:
    """Train gates that weight adapters per block and per range of denoising steps, and save them as a blend preset."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml", help_behavior_hint="")]
    """TOML file with the settings, which are listed above."""
    set: Changes = ()
    """Change one setting of the file."""
    json: Switch = False
    """Print the result as JSON."""

    @classmethod
    def describe_command(cls) -> str:
        """Return the description for the command's own help, with all settings of the file."""
        return f"{inspect.getdoc(cls)}\n\nSettings of the TOML file:\n{settings_table(RouteConfig)}"

    def run(self) -> None:
        """Run the command."""
        changes = parse_changes(self.set)
        with quiet_libraries():
            from lora_diffusion.training.routing.train import read_route, route

            result = route(read_route(self.config, changes))
        facts = {"preset": str(result.path), "first_loss": result.first_loss, "last_loss": result.last_loss}
        text = f"{result.path}: loss on held-out noise {result.first_loss:.4f} -> {result.last_loss:.4f}"
        print(json.dumps(facts) if self.json else text)
