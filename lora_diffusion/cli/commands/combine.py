"""The commands `combine` and `resize`, which write one adapter from several, or one at another rank."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lora_diffusion.cli.blend_flags import parse_adapters
from lora_diffusion.cli.flags import IgnoreUnmatched, Switch, describe_flag, given_settings, optional_flags
from lora_diffusion.config.combine import FORMER_METHOD_NAMES, CombineConfig, ConsensusConfig, RankRule
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError


class RankFlags(optional_flags(RankRule)):
    """Flags that choose the rank of each module; at most one of them, and `--at-most`."""


class ConsensusFlags(
    optional_flags(ConsensusConfig, {"projection_strength": "strength"}, hints={"method": "(default: weighted sum)"})
):
    """Flags of the consensus methods."""


class OutputFlags(
    optional_flags(CombineConfig, exclude=("rule", "first", "consensus", "ignore_unmatched"), hints={"base": ""})
):
    """Flags of the written file."""


def read_rank_rule(flags: RankFlags, source: str) -> RankRule | None:
    """Return the rank rule that the flags describe, or None if no flag is given.

    Raises:
        ConfigError: If the flags contradict each other, or a value is invalid.
    """
    given = given_settings(flags)
    return validate(RankRule, given, source=source) if given else None


def read_consensus(flags: ConsensusFlags) -> ConsensusConfig | None:
    """Return the consensus settings that the flags describe, or None if no flag is given.

    Raises:
        ConfigError: If a setting is given without a method, or a value is invalid.
    """
    given = given_settings(flags)
    if not given:
        return None
    method = given.get("method")
    if not method:
        raise ConfigError(f"--{next(iter(given))} is a setting of --method; add one, such as --method ties")
    if method in FORMER_METHOD_NAMES:
        print(f"note: --method {method} is now called {FORMER_METHOD_NAMES[method]}", file=sys.stderr)
    return validate(ConsensusConfig, given, source="combine")


def write_combination(entries: tuple[BlendEntry, ...], output: Path, settings: dict[str, Any], *, as_json: bool) -> int:
    """Combine adapters, and print the result."""
    from lora_diffusion.workflows.adapters.combine import combine_files, format_report, to_json

    done = combine_files(entries, output, validate(CombineConfig, settings, source="combine"))
    print(json.dumps(to_json(done)) if as_json else format_report(done))
    return 0


@dataclass(frozen=True, kw_only=True)
class Combine:
    """Combine adapters into one adapter.

    Example: `lora-diffusion combine ink.safetensors:0.8 neon.safetensors:0.6 both.safetensors`

    Without a rank flag the sum is exact, and its rank is the sum of the ranks. With one, each module gets its best
    approximation of that rank, and the error is printed.
    """

    files: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FILE[:WEIGHT] ... OUT", help_behavior_hint=""),
    ]
    """Adapter files with weights (default 1) and options as in `<lora:...>` tags; last, the file to write."""
    consensus: Annotated[ConsensusFlags, tyro.conf.arg(name="")]
    rank: Annotated[RankFlags, tyro.conf.arg(name="")]
    output: Annotated[OutputFlags, tyro.conf.arg(name="")]
    ignore_unmatched: IgnoreUnmatched = ()
    json: Switch = False
    """Print the result as JSON, with the error of each module."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        if len(self.files) < 2:
            raise ConfigError("give at least one adapter and, last, the output: combine A:0.8 B:0.6 OUT.safetensors")
        *adapters, output = self.files
        settings = {
            **given_settings(self.output),
            "rule": read_rank_rule(self.rank, "combine"),
            "consensus": read_consensus(self.consensus),
            "ignore_unmatched": self.ignore_unmatched,
        }
        return write_combination(parse_adapters(tuple(adapters)), Path(output), settings, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Write an adapter at another rank.

    Example: `lora-diffusion resize large.safetensors small.safetensors --rank 8`

    Each module gets its best approximation of the rank that the rule chooses, and the error is printed.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN", help_behavior_hint="")]
    """Adapter to read, in any dialect."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    first: Annotated[str | None, describe_flag(CombineConfig, "first")] = None
    rank: Annotated[RankFlags, tyro.conf.arg(name="")]
    output: Annotated[OutputFlags, tyro.conf.arg(name="")]
    ignore_unmatched: IgnoreUnmatched = ()
    json: Switch = False
    """Print the result as JSON, with the error of each module."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        rule = read_rank_rule(self.rank, "resize")
        if (rule is None) == (self.first is None):
            raise ConfigError("give exactly one rank flag, such as --rank 8, --keep 0.99 or --first 4")
        settings = {
            **given_settings(self.output),
            "rule": rule,
            "first": self.first,
            "ignore_unmatched": self.ignore_unmatched,
        }
        return write_combination((BlendEntry(path=str(self.source)),), self.target, settings, as_json=self.json)
