"""The command `ui`, which opens the studio."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.blend_flags import DEFAULT_QUANTIZATION, QuantizeFlag
from lora_diffusion.cli.flags import REPEATABLE, Switch, quiet_libraries
from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open the studio in a browser: blend adapters, compare images, save presets, merge and train.

    The studio listens on this machine only. `--host` and `--share` make it reachable for others and need a password.
    """

    base: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="BASE", help_behavior_hint=REPEATABLE)
    ] = ()
    """Base model to offer: `tiny-sd`, a folder in diffusers' layout, or a hub id; the embedded `tiny-sd` by default."""
    quantize: QuantizeFlag = DEFAULT_QUANTIZATION
    library: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER", help_behavior_hint="(default: a folder in the output, with the built-in adapters)"
        ),
    ] = None
    """Folder of adapters."""
    output: Path = Path("studio")
    """Folder for images, presets and everything else that the studio writes."""
    host: str = "127.0.0.1"
    """Network address to listen on."""
    port: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the first free one from 7860)")
    ] = None
    """Network port to listen on."""
    share: Switch = False
    """Open a public address through Gradio's servers."""
    password: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = ""
    """Password of the user `studio`."""
    api: Switch = False
    """Offer the endpoints `/generate` and `/adapters` to programs that use `gradio_client`."""

    def run(self) -> None:
        """Run the command."""
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            with quiet_libraries():
                from lora_diffusion_studio.app import serve
                from lora_diffusion_studio.backend.config import StudioConfig, create_default_library, resolve_bases
                from lora_diffusion_studio.backend.studio import Studio
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the studio needs the package {error.name}; install it with pip install 'lora-diffusion[ui]'"
            ) from None
        with quiet_libraries():
            config = StudioConfig(
                library=self.library or create_default_library(self.output),
                output=self.output,
                bases=resolve_bases(self.base),
                quantization=self.quantize,
            )
            studio = Studio(config)
        serve(studio, host=self.host, port=self.port, share=self.share, password=self.password, api=self.api)
