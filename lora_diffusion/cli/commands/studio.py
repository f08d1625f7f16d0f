"""The command `ui`, which opens the studio."""

import os
from dataclasses import dataclass
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import REPEATABLE, describe_flag, given_settings, optional_flags, quiet_libraries
from lora_diffusion.config.settings import validate
from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.errors import ConfigError


class StudioFlags(optional_flags(StudioConfig, exclude=("bases",))):
    """Flags of the studio's settings."""


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open the studio in a browser: blend adapters, compare images, save presets, merge and train.

    The studio listens on this machine only. `--host` and `--share` make it reachable for others and need a password.
    """

    base: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        describe_flag(StudioConfig, "bases", hint=REPEATABLE, metavar="BASE"),
    ] = ()
    settings: Annotated[StudioFlags, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Run the command."""
        bases = {"bases": self.base} if self.base else {}
        config = validate(StudioConfig, {**bases, **given_settings(self.settings)}, source="ui")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            with quiet_libraries():
                from lora_diffusion_studio.app import serve
                from lora_diffusion_studio.backend.studio import Studio
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the studio needs the package {error.name}; install it with pip install 'lora-diffusion[ui]'"
            ) from None
        with quiet_libraries():
            studio = Studio(config)
        serve(studio)
