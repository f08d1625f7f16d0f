"""The command `merge`, which writes adapters and other checkpoints into a checkpoint."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lora_diffusion.cli.blend_flags import Adapters, LoadFlags, parse_adapters
from lora_diffusion.cli.flags import (
    REPEATABLE,
    Switch,
    describe_base_flag,
    given_settings,
    optional_flags,
    quiet_libraries,
)
from lora_diffusion.config.merge import MergeConfig
from lora_diffusion.config.preset import BaseTerm
from lora_diffusion.config.settings import EMBEDDED_BASE, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.prompts.tags import is_number

if TYPE_CHECKING:
    from lora_diffusion.workflows.merge import MergeRequest

Checkpoints = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="CHECKPOINT:WEIGHT[:minus=OTHER]", help_behavior_hint=REPEATABLE),
]
"""Flag for the checkpoints to blend into the base, each with its weight."""


class MergeFlags(optional_flags(MergeConfig)):
    """Flags of the merge settings."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge adapters and other checkpoints into a base model, as a single file or a folder in diffusers' layout.

    The output is a single file if its name ends in .safetensors, else a folder. `--from` repeats the merge that made a
    checkpoint, and `--undo` restores the base of one bit for bit.
    """

    output: Path
    """File or folder to write."""
    settings: Annotated[MergeFlags, tyro.conf.arg(name="")]
    load: Annotated[LoadFlags, tyro.conf.arg(name="")]
    base: Annotated[
        str,
        describe_base_flag("Base model", hint=f"(default: {EMBEDDED_BASE}, or that of the preset or recipe)"),
    ] = ""
    adapter: Adapters = ()
    preset: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Blend preset (JSON) whose base and adapters are merged."""
    checkpoint: Checkpoints = ()
    """Checkpoint to merge: a weighted sum with the base, or with minus=OTHER the added difference of both."""
    like: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of the same family to copy tokenizer and configuration from, if a single-file base becomes a folder."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="MERGED", help_behavior_hint="")] = None
    """Merged checkpoint whose recipe is run again."""
    undo: Annotated[Path | None, tyro.conf.arg(metavar="MERGED", help_behavior_hint="")] = None
    """Merged checkpoint whose base is restored to the output."""
    force: Switch = False
    """Replace an existing file, and allow merging adapters that are merged into the base already."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        with quiet_libraries():
            if self.undo:
                return self.undo_merge(self.undo)
            from lora_diffusion.workflows.merge import merge_files

            report, notes = merge_files(self.make_request(), self.output, self.load.config())
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        facts = {
            "output": str(report.output),
            "merged_modules": report.merged_modules,
            "rounding_error": report.rounding_error,
            "bytes": report.num_bytes,
            "textual_inversion": [str(file) for file in report.embedding_files],
        }
        text = (
            f"{report.output}: {report.merged_modules} modules merged, {report.num_bytes / 1e6:,.0f} MB; "
            f"rounding changed the merged deltas by {report.rounding_error:.2%}"
        )
        lines = [text, *(f"{file}: textual-inversion embedding" for file in report.embedding_files)]
        print(json.dumps(facts) if self.json else "\n".join(lines))
        return None

    def make_request(self) -> "MergeRequest":
        """Return the merge to run."""
        from lora_diffusion.workflows.merge import MergeRequest, read_preset_entries, request_from_checkpoint

        settings = given_settings(self.settings)
        if self.from_:
            if settings or self.adapter or self.preset or self.checkpoint or self.like or self.load.balance:
                raise ConfigError(
                    "--from repeats a merge with its own settings; combine it only with --base, --library and --output"
                )
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
        """Restore the base of a merged checkpoint."""
        from lora_diffusion.workflows.merge import undo_files

        if given_settings(self.settings) or self.adapter or self.preset or self.checkpoint or self.like or self.from_:
            raise ConfigError("--undo restores the base as it was; combine it only with --base, --library and --output")
        how = undo_files(merged, self.output, base=self.base, load=self.load.config())
        facts = {"output": str(self.output), "how": how}
        print(json.dumps(facts) if self.json else f"{self.output}: {how}")


def parse_checkpoint(text: str) -> BaseTerm:
    """Parse CHECKPOINT:WEIGHT[:minus=OTHER].

    Raises:
        ConfigError: If the text has another form.
    """
    summed, _, taken = text.partition(":minus=")
    added, _, weight = summed.rpartition(":")
    if not added or not is_number(weight) or (":minus=" in text and not taken):
        raise ConfigError(f"--checkpoint {text}: expected CHECKPOINT:WEIGHT or CHECKPOINT:WEIGHT:minus=OTHER")
    return validate(BaseTerm, {"added": added, "weight": weight, "taken": taken}, source=f"--checkpoint {text}")
