"""The command that merges."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lora_diffusion.cli.blend_flags import Adapters, BaseFlag, LoadFlags, parse_adapters, set_flags
from lora_diffusion.cli.flags import REPEATABLE, optional_flags, quiet_libraries
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm
from lora_diffusion.config.settings import EMBEDDED_BASE, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.prompts.tags import is_number

Checkpoints = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="CHECKPOINT:WEIGHT[:minus=OTHER]", help_behavior_hint=REPEATABLE),
]
MergeFlags = optional_flags(MergeConfig)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge adapters and other checkpoints into a checkpoint: a single file if the output ends in .safetensors, else a
    folder in diffusers' layout.

    `--from` runs the recipe of a merged checkpoint again, `--undo` gives its base back bit for bit.
    """

    output: Path
    """File or folder to write."""
    settings: Annotated[MergeFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    where: Annotated[LoadFlags, tyro.conf.arg(name="")]
    base: BaseFlag = ""
    """`tiny-sd`, a folder in diffusers' layout, a single .safetensors file in the original layout, or a hub id."""
    adapter: Adapters = ()
    """Adapter and its weight, 1 if not given; options may follow, as in a prompt's tags."""
    preset: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Blend preset (JSON) whose base and adapters are merged."""
    checkpoint: Checkpoints = ()
    """Checkpoint blended into the base: a weighted sum at that weight, or with minus=OTHER their difference added."""
    like: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of the same family that lends tokenizer and configuration when a single file becomes a folder."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="MERGED", help_behavior_hint="")] = None
    """Merged checkpoint whose recipe is run again."""
    undo: Annotated[Path | None, tyro.conf.arg(metavar="MERGED", help_behavior_hint="")] = None
    """Merged checkpoint whose base is written to the output."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a file that is there; merge once more into a base that has this merge in it already."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON."""

    def run(self) -> None:
        with quiet_libraries():
            if self.undo:
                return self.undo_merge(self.undo)
            from lora_diffusion.workflows.merge import merge_files

            report, notes = merge_files(self.make_request(), self.output, self.where.options())
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        facts = {
            "output": str(report.output),
            "merged_modules": report.merged_modules,
            "rounding_error": report.rounding_error,
            "bytes": report.num_bytes,
            "words": [str(file) for file in report.embedding_files],
        }
        text = (
            f"{report.output}: {report.merged_modules} modules merged, {report.num_bytes / 1e6:,.0f} MB; "
            f"rounding changed what was merged in by {report.rounding_error:.2%}"
        )
        lines = [text, *(f"{file}: learned word" for file in report.embedding_files)]
        print(json.dumps(facts) if self.json else "\n".join(lines))
        return None

    def make_request(self) -> Any:
        """What to merge, from the flags."""
        from lora_diffusion.workflows.merge import MergeRequest, read_preset_entries, request_from_checkpoint

        settings = set_flags(self.settings)
        if self.from_:
            if settings or self.adapter or self.preset or self.checkpoint or self.like or self.where.balance:
                raise ConfigError("--from merges once more what was merged; give only --base, --library and --output")
            return request_from_checkpoint(self.from_, base=self.base, force=self.force)
        base, entries = read_preset_entries(self.preset) if self.preset else ("", ())
        return MergeRequest(
            base=self.base or base or EMBEDDED_BASE,
            entries=entries + parse_adapters(self.adapter),
            bases=tuple(parse_checkpoint(text) for text in self.checkpoint),
            config=validate(MergeConfig, settings, source="merge"),
            like=self.like,
            force=self.force,
        )

    def undo_merge(self, merged: Path) -> None:
        from lora_diffusion.workflows.merge import undo_files

        if set_flags(self.settings) or self.adapter or self.preset or self.checkpoint or self.like or self.from_:
            raise ConfigError("--undo gives the base back as it was; give only --base, --library and --output")
        how = undo_files(merged, self.output, base=self.base, options=self.where.options())
        facts = {"output": str(self.output), "how": how}
        print(json.dumps(facts) if self.json else f"{self.output}: {how}")


def parse_checkpoint(text: str) -> BaseTerm:
    """CHECKPOINT:WEIGHT[:minus=OTHER]. Raises ConfigError."""
    summed, _, taken = text.partition(":minus=")
    added, _, weight = summed.rpartition(":")
    if not added or not is_number(weight) or (":minus=" in text and not taken):
        raise ConfigError(f"--checkpoint {text}: expected CHECKPOINT:WEIGHT or CHECKPOINT:WEIGHT:minus=OTHER")
    return validate(BaseTerm, {"added": added, "weight": weight, "taken": taken}, source=f"--checkpoint {text}")
