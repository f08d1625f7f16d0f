"""The commands `library pack` and `library unpack`, which store many adapters in one file with shared factors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Switch, given_settings, optional_flags
from lora_diffusion.config.adapter_files import PackConfig
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError


class PackFlags(optional_flags(PackConfig)):
    """Flags of the packing settings."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Store plain LoRA adapters in one file with shared factors.

    Example: `lora-diffusion library pack FOLDER pack.safetensors --rank 64`

    Directions that the adapters have in common are stored once. Adapters without common directions lose quality, so
    check the printed error.
    """

    paths: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER|FILE ... OUT", help_behavior_hint="")
    ]
    """Adapter files, or folders of them; last, the file to write (.safetensors)."""
    settings: Annotated[PackFlags, tyro.conf.arg(name="")]
    json: Switch = False
    """Print the result as JSON, with the error of each adapter."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        if len(self.paths) < 2:
            raise ConfigError("give at least one adapter or folder and, last, the output: FOLDER OUT --rank 32")
        config = validate(PackConfig, given_settings(self.settings), source="library pack")
        from lora_diffusion.workflows.adapters.pack import describe_pack, pack_files, pack_to_json

        done = pack_files(self.paths[:-1], self.paths[-1], config)
        print(json.dumps(pack_to_json(done)) if self.json else describe_pack(done))
        return 0


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """Write the adapters of a pack as separate files."""

    pack: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PACK", help_behavior_hint="")]
    """File that `library pack` wrote."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Folder to write to."""
    name: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: all)")] = ""
    """Name of one adapter to unpack; the others are not read."""
    force: Switch = False
    """Replace existing files."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        from lora_diffusion.workflows.adapters.pack import describe_unpack, unpack_file, unpack_to_json

        done = unpack_file(self.pack, self.folder, name=self.name, force=self.force)
        print(json.dumps(unpack_to_json(done)) if self.json else describe_unpack(done))
        return 0
