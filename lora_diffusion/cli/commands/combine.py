"""The commands that make adapters into one of the rank that is wanted: combine, resize."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lora_diffusion.cli.blend_flags import parse_adapters
from lora_diffusion.cli.flags import Patterns
from lora_diffusion.config.merge import WeightType
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.errors import ConfigError


def optional_flag(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class RankFlags:
    """Which rank each module gets; one of the first seven."""

    rank: Annotated[int | None, optional_flag("N")] = None
    """Rank N everywhere, less where the delta has no more."""
    keep: Annotated[float | None, optional_flag("SHARE")] = None
    """The lowest rank that keeps this share of the squared Frobenius norm of the delta, such as 0.99."""
    ratio: Annotated[float | None, optional_flag("NUMBER")] = None
    """Every singular value of at least the largest / NUMBER."""
    frobenius: Annotated[float | None, optional_flag("SHARE")] = None
    """The lowest rank that keeps this share of the Frobenius norm, not squared."""
    cumulative: Annotated[float | None, optional_flag("SHARE")] = None
    """The lowest rank that keeps this share of the sum of singular values."""
    threshold: Annotated[float | None, optional_flag("NUMBER")] = None
    """Every singular value of at least this, in units of the weights."""
    quantile: Annotated[float | None, optional_flag("SHARE")] = None
    """Every singular value above this quantile of the module's own, such as 0.9."""
    at_most: Annotated[int | None, optional_flag("N")] = None
    """No rank above N, whatever the rule says."""

    def rule(self) -> Any:
        """The rule, or None if no flag is set. Raises ConfigError for one that cannot be used."""
        from lora_diffusion.algebra.svd.rank_selection import RankRule

        ways = {key: value for key, value in vars(self).items() if value is not None}
        return RankRule(**ways) if ways else None


@dataclass(frozen=True, kw_only=True)
class ConsensusFlags:
    """What decides where adapters disagree, instead of the sum."""

    method: Annotated[
        Literal["ties", "dare", "della", "knots", "magnitude", "median", "slerp", "zip", "np-lora"] | None,
        optional_flag("ties|dare|della|knots|magnitude|median|slerp|zip|np-lora"),
    ] = None
    """A rule that decides where adapters disagree, instead of the sum. slerp and zip take two adapters; np-lora takes
    the others' directions out of the first."""
    density: Annotated[float | None, optional_flag("SHARE")] = None
    """Share of the numbers that stay (ties, dare, della, knots, magnitude; default 0.5)."""
    seed: Annotated[int | None, optional_flag("N")] = None
    """Seed of what is dropped at random (dare, della; default 0)."""
    spread: Annotated[float | None, optional_flag("NUMBER")] = None
    """How much more often small numbers are dropped than large ones, 0 to below 1 (della; default 0.2)."""
    disjoint: Annotated[Literal["mean", "sum"] | None, optional_flag("mean|sum")] = None
    """Numbers that agree in sign become their mean, as strong as one adapter, or their sum (ties, della, knots)."""
    penalty: Annotated[float | None, optional_flag("NUMBER")] = None
    """How much shared columns give way to each other, 0 to below 1 (zip; default 0.9)."""
    strength: Annotated[float | None, optional_flag("NUMBER")] = None
    """How strongly the others' directions are taken out of the first: 0 not, 1 half (np-lora; default 1)."""

    def consensus(self) -> Any:
        """The settings, or None if no method is set. Raises ConfigError for settings that cannot be used."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        if given and not self.method:
            raise ConfigError(f"--{next(iter(given))} belongs to a --method; give one, such as --method ties")
        if not self.method:
            return None
        from lora_diffusion.algebra.combine.methods import ConsensusConfig

        return ConsensusConfig(**given)


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What a delta is taken against, and how the file is written."""

    base: Annotated[str, optional_flag("BASE")] = ""
    """Base of the adapters (folder, single file or hub id); DoRA layers have no delta without it."""
    dtype: WeightType = "keep"
    """Type of the written tensors; `keep` is that of the inputs, or float32 if they differ."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a file that is there."""
    ignore_unmatched: Patterns = ()
    """Keys of adapter files that may be there without being understood."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON, module by module."""

    def write(
        self,
        entries: tuple[BlendEntry, ...],
        output: Path,
        rule: Any,
        consensus: Any = None,
        first: int | None = None,
    ) -> int:
        """Do it and say what came of it."""
        from lora_diffusion.workflows.adapters.combine import CombineConfig, combine_files, format_report, to_json

        how = CombineConfig(
            rule=rule,
            first=first,
            consensus=consensus,
            base=self.base,
            dtype=self.dtype,
            force=self.force,
            ignore=self.ignore_unmatched,
        )
        done = combine_files(entries, output, how)
        print(json.dumps(to_json(done)) if self.json else format_report(done))
        return 0


@dataclass(frozen=True, kw_only=True)
class Combine:
    """Make one adapter of several: `combine ink.safetensors:0.8 neon.safetensors:0.6 both.safetensors`.

    Without a rank the sum is exact and ranks add up; with one it is the closest of that rank, and the error is printed.
    """

    files: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FILE[:WEIGHT] ... OUT", help_behavior_hint=""),
    ]
    """Adapters with their weights, 1 if not given, options as in a prompt's tags; last, the file to write."""
    by: Annotated[ConsensusFlags, tyro.conf.arg(name="")]
    rank: Annotated[RankFlags, tyro.conf.arg(name="")]
    how: Annotated[OutputFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        if len(self.files) < 2:
            raise ConfigError("give at least one adapter and, last, the output: combine A:0.8 B:0.6 OUT.safetensors")
        *adapters, output = self.files
        entries = parse_adapters(tuple(adapters))
        return self.how.write(entries, Path(output), self.rank.rule(), self.by.consensus())


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Write an adapter at the rank that a rule chooses, the closest of that rank; the error is printed."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN", help_behavior_hint="")]
    """Adapter to read, in any dialect."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help_behavior_hint="")]
    """File to write (.safetensors)."""
    first: Annotated[int | None, optional_flag("N")] = None
    """The first N directions as they stand, without SVD: for adapters that were trained by DyLoRA."""
    rank: Annotated[RankFlags, tyro.conf.arg(name="")]
    how: Annotated[OutputFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        rule = self.rank.rule()
        if (rule is None) == (self.first is None):
            raise ConfigError("give the rank once, such as --rank 8, --keep 0.99 or --first 4; see --help for all ways")
        return self.how.write((BlendEntry(path=str(self.source)),), self.output, rule, first=self.first)
