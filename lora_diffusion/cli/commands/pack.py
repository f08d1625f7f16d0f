"""The commands on packs: many adapters in one file with shared factors, and out of it again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.config.merge import WeightType
from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Store adapters of plain LoRA in one file, with bases that they share: the inputs first, the output file last.

    What the adapters have in common is stored once. Adapters that have nothing in common lose by it: look at the error.
    """

    paths: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER|FILE ... OUT", help_behavior_hint="")
    ]
    """Adapters, or folders of them, and the file to write (.safetensors)."""
    rank: int
    """Rank of the shared bases; exact where it is at least the sum of the adapters' ranks."""
    dtype: WeightType = "keep"
    """Type of the written tensors; `keep` is the adapters' own, or float32 if they have several."""
    force: bool = False
    """Replace a file that is there."""
    json: bool = False
    """Print the result as JSON, with the error of every adapter."""

    def run(self) -> int:
        from lora_diffusion.workflows.adapters.pack import PackConfig, describe_pack, pack_files, pack_to_json

        if len(self.paths) < 2:
            raise ConfigError("give at least one adapter or folder and, last, the output: FOLDER OUT --rank 32")
        how = PackConfig(rank=self.rank, dtype=self.dtype, force=self.force)
        done = pack_files(self.paths[:-1], self.paths[-1], how)
        print(json.dumps(pack_to_json(done)) if self.json else describe_pack(done))
        return 0


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """Write the adapters of a pack as files of their own."""

    pack: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PACK", help_behavior_hint="")]
    """File that `pack` wrote."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTFOLDER", help_behavior_hint="")]
    """Folder to write to."""
    name: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: all)")] = ""
    """Only the adapter of this name; the others are not read."""
    force: bool = False
    """Replace files that are there."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        from lora_diffusion.workflows.adapters.pack import describe_unpack, unpack_file, unpack_to_json

        done = unpack_file(self.pack, self.folder, name=self.name, force=self.force)
        print(json.dumps(unpack_to_json(done)) if self.json else describe_unpack(done))
        return 0
