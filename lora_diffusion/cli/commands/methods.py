"""The command that lists the methods of training: methods."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import quiet_libraries
from lora_diffusion.config.settings import EMBEDDED_BASE
from lora_diffusion.errors import ConfigError

Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods of training, with what each trains on a base, its file's size, and when to choose it.

    A method is chosen by lines in a training config, or by `--set` as shown. The numbers are the arithmetic of
    rank * (inputs + outputs) over all modules, with the defaults for a style.
    """

    names: Names = ()
    """Methods to show; all if none is named."""
    base: str = EMBEDDED_BASE
    """Base: `tiny-sd`, a folder in diffusers' layout, a single file, or a hub id."""
    rank: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the base's)")] = None
    """Rank of every method."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        from lora_diffusion.config.methods import METHODS

        known = [method.name for method in METHODS]
        unknown = [name for name in self.names if name not in known]
        if unknown:
            raise ConfigError(f"no method called {unknown[0]!r}; there are {', '.join(known)}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank is {self.rank}; expected a whole number of at least 1")
        with quiet_libraries():
            from lora_diffusion.workflows.training.method_sizes import format_methods, list_methods, to_json

            found = list_methods(self.base, self.rank, self.names)
        print(json.dumps(to_json(found)) if self.json else format_methods(found, self.base))
