"""The commands `extract` and `approximate`, which write low-rank adapters from checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lora_diffusion.cli.commands.combine import RankFlags, read_rank_rule
from lora_diffusion.cli.flags import (
    Switch,
    describe_base_flag,
    describe_flag,
    given_settings,
    optional_flags,
    quiet_libraries,
)
from lora_diffusion.config.adapter_files import ExtractConfig
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from lora_diffusion.workflows.adapters.extract import ExtractResult


class ExtractFlags(optional_flags(ExtractConfig, exclude=("rule", "norms_and_biases"))):
    """Flags of what is extracted, and how it is written."""


def read_extract_config(
    rank: RankFlags, flags: ExtractFlags, source: str, norms_and_biases: str | None = None
) -> ExtractConfig:
    """Return the settings that the flags describe.

    Raises:
        ConfigError: If there is no rank, or a value is invalid.
    """
    rule = read_rank_rule(rank, source)
    if rule is None:
        raise ConfigError("give a rank flag, such as --rank 32 or --keep 0.99")
    given = {**given_settings(flags), "rule": rule}
    if norms_and_biases:
        given["norms_and_biases"] = norms_and_biases
    return validate(ExtractConfig, given, source=source)


def print_extraction(result: "ExtractResult", *, as_json: bool) -> int:
    """Print the result of an extraction."""
    from lora_diffusion.workflows.adapters.extract_report import format_report, to_json

    print(json.dumps(to_json(result)) if as_json else format_report(result))
    return 0


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Extract a LoRA from a fine-tuned checkpoint.

    Example: `lora-diffusion extract tuned.safetensors lora.safetensors --base BASE --rank 32`

    The UNet and the text encoders are compared, convolutions included, and no value is clamped. The error is printed
    per block and in total.
    """

    tuned: Annotated[str, tyro.conf.Positional, describe_base_flag("Fine-tuned checkpoint", hint="", metavar="TUNED")]
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    base: Annotated[str, describe_base_flag("Checkpoint that was fine-tuned", hint="(required)")]
    rank: Annotated[RankFlags, tyro.conf.arg(name="")]
    settings: Annotated[ExtractFlags, tyro.conf.arg(name="")]
    norms_and_biases: Annotated[str | None, describe_flag(ExtractConfig, "norms_and_biases")] = None
    json: Switch = False
    """Print the result as JSON, with the error of each module."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        config = read_extract_config(self.rank, self.settings, "extract", self.norms_and_biases)
        with quiet_libraries():
            from lora_diffusion.workflows.adapters.extract import extract_file

        return print_extraction(extract_file(self.tuned, self.base, self.output, config), as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Approximate:
    """Write a low-rank approximation of a base's own weights (SVD compression).

    Example: `lora-diffusion approximate BASE low.safetensors --rank 128`

    The file has the layout of an adapter but holds the weights themselves, so all commands refuse to add it to a base.
    """

    base: Annotated[str, tyro.conf.Positional, describe_base_flag("Checkpoint", hint="")]
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    rank: Annotated[RankFlags, tyro.conf.arg(name="")]
    settings: Annotated[ExtractFlags, tyro.conf.arg(name="")]
    json: Switch = False
    """Print the result as JSON, with the error of each module."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        config = read_extract_config(self.rank, self.settings, "approximate")
        with quiet_libraries():
            from lora_diffusion.workflows.adapters.extract import approximate_file

        return print_extraction(approximate_file(self.base, self.output, config), as_json=self.json)
