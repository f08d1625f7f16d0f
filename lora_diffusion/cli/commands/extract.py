"""The commands that take adapters out of checkpoints: extract, approximate."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lora_diffusion.cli.commands.combine import RankFlags
from lora_diffusion.cli.flags import quiet_libraries
from lora_diffusion.config.merge import WeightType
from lora_diffusion.errors import ConfigError

Targets = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[SET|PATTERN ...]", help_behavior_hint="(default: all)")]


@dataclass(frozen=True, kw_only=True)
class ExtractFlags:
    """What is taken, and how the file is written."""

    rank: Annotated[RankFlags, tyro.conf.arg(name="")]
    method: Literal["exact", "randomized"] = "exact"
    """The whole SVD of every module; or, with --rank, a seeded random sketch of those that are much larger than N."""
    unet_target_modules: Targets = ("all",)
    """Modules of the UNet: named sets or patterns, as in training; the flag without a value for none."""
    text_encoder_target_modules: Targets = ("all",)
    """Modules of the text encoders, in the same way."""
    dtype: WeightType = "keep"
    """Type of the factors; `keep` is that of the checkpoints, or float32 if they differ."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a file that is there."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON, module by module."""

    def config(self) -> Any:
        """For the library. Raises ConfigError for flags that contradict each other."""
        from lora_diffusion.workflows.adapters.extract import ExtractConfig

        rule = self.rank.rule()
        if rule is None:
            raise ConfigError("give the rank, such as --rank 32 or --keep 0.99")
        return ExtractConfig(
            rule=rule,
            method=self.method,
            unet=self.unet_target_modules,
            text_encoders=self.text_encoder_target_modules,
            dtype=self.dtype,
            force=self.force,
        )

    def print_result(self, done: Any) -> int:
        """Say what came of it."""
        from lora_diffusion.workflows.adapters.extract_report import format_report, to_json

        print(json.dumps(to_json(done)) if self.json else format_report(done))
        return 0


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Take an adapter out of a tuned checkpoint: `extract tuned.safetensors mine.safetensors --base BASE --rank 32`.

    Convolutions and text encoders are included, and no value is clamped; the error is printed by block and in all.
    """

    tuned: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED", help_behavior_hint="")]
    """Checkpoint with the change in it: a folder in diffusers' layout, a single file, or a hub id."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    base: Annotated[str, tyro.conf.arg(metavar="BASE", help_behavior_hint="(required)")]
    """Checkpoint without the change: `tiny-sd`, a folder, a single file, or a hub id."""
    norms_and_biases: Literal["leave", "keep"] = "leave"
    """Leave out norms and biases that differ, which not every program reads, or keep them, whole and in float32."""
    how: Annotated[ExtractFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        with quiet_libraries():
            from lora_diffusion.workflows.adapters.extract import extract_file

        how = replace(self.how.config(), norms_and_biases=self.norms_and_biases)
        return self.how.print_result(extract_file(self.tuned, self.base, self.output, how))


@dataclass(frozen=True, kw_only=True)
class Approximate:
    """Write the low-rank part of a base's own weights (SVD compression): `approximate BASE low.safetensors --rank 128`.

    Not an adapter, though laid out as one: it is the weights themselves, and commands refuse to add it to a base.
    """

    base: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BASE", help_behavior_hint="")]
    """Checkpoint: `tiny-sd`, a folder in diffusers' layout, a single file, or a hub id."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    how: Annotated[ExtractFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        with quiet_libraries():
            from lora_diffusion.workflows.adapters.extract import approximate_file

        return self.how.print_result(approximate_file(self.base, self.output, self.how.config()))
