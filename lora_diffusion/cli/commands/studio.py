"""The command that opens the studio."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import REPEATABLE, quiet_libraries
from lora_diffusion.config.settings import Quantization
from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open the studio in a browser: blend, compare, keep, merge, train.

    It listens on this machine alone; `--host` and `--share` let others in, and then a password is asked for.
    """

    base: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help_behavior_hint=REPEATABLE)] = ()
    """Base to offer: `tiny-sd`, a folder in diffusers' layout, or a hub id; the embedded one if none is given."""
    quantize: Annotated[Quantization, tyro.conf.arg(metavar="none|nf4|fp4|int8")] = "none"
    """Keep the bases' linear layers in four or eight bits, for a GPU that cannot hold them; needs bitsandbytes."""
    library: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: one in the output, with the ready adapters)"),
    ] = None
    """Folder of the adapters."""
    output: Path = Path("studio")
    """Folder for pictures, presets and whatever else the studio writes."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the first free from 7860)")
    ] = None
    """Port to listen on."""
    share: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Open a public address through Gradio's servers."""
    password: str = ""
    """Password of the user `studio`."""
    api: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Offer named endpoints to programs: `/generate` and `/adapters` for `gradio_client`."""

    def run(self) -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            with quiet_libraries():
                from lora_diffusion_studio.app import serve
                from lora_diffusion_studio.backend.config import StudioConfig, create_default_library, resolve_bases
                from lora_diffusion_studio.backend.studio import Studio
        except ModuleNotFoundError as error:
            raise ConfigError(f"the studio needs {error.name}; pip install 'lora-diffusion[ui]'") from None
        with quiet_libraries():
            config = StudioConfig(
                library=self.library or create_default_library(self.output),
                output=self.output,
                bases=resolve_bases(self.base),
                quantization=self.quantize,
            )
            studio = Studio(config)
        serve(studio, host=self.host, port=self.port, share=self.share, password=self.password, api=self.api)
