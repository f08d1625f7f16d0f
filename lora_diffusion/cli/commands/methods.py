"""The command `methods`, which lists the training methods."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Switch, describe_flag, quiet_libraries
from lora_diffusion.config.generate import BaseConfig
from lora_diffusion.config.settings import EMBEDDED_BASE
from lora_diffusion.errors import ConfigError

Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the training methods: how many parameters each trains, the size of its file, and when to choose it.

    To choose a method, put its settings into the training config, or pass them with `--set` as shown. Sizes are
    computed from the shapes of the base's weights, with the default settings for a style.
    """

    names: Names = ()
    """Methods to show; all by default."""
    base: Annotated[str, describe_flag(BaseConfig, "base")] = EMBEDDED_BASE
    rank: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: that of the base)")] = None
    """Rank of every method."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        from lora_diffusion.config.methods import METHODS

        known = [method.name for method in METHODS]
        unknown = [name for name in self.names if name not in known]
        if unknown:
            raise ConfigError(f"unknown method {unknown[0]!r}; choose from {', '.join(known)}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank is {self.rank}; expected an integer of at least 1")
        with quiet_libraries():
            from lora_diffusion.workflows.training.method_sizes import format_methods, list_methods, to_json

            found = list_methods(self.base, self.rank, self.names)
        print(json.dumps(to_json(found)) if self.json else format_methods(found, self.base))
