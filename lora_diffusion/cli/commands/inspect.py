"""The commands on adapter files: inspect, convert, verify, library."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Patterns, quiet_libraries
from lora_diffusion.config.merge import WeightType
from lora_diffusion.config.settings import Dialect
from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what is in adapter files, from their headers alone."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")]
    """Adapter files, or folders that PEFT saved."""
    norms: bool = False
    """Read the tensors too: norms of the deltas, dead layers, NaN and hashes."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="PNG", help_behavior_hint="")] = None
    """Draw the norms into this picture; one adapter only."""
    ignore_unmatched: Patterns = ()
    """Keys that may be there without being understood."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> int:
        from lora_diffusion.workflows.adapters.inspect import describe_inspection, inspect_adapter

        if not self.files or (self.plot and len(self.files) > 1):
            raise ConfigError("give one adapter to plot" if self.files else "give at least one adapter file")
        read = self.norms or self.plot is not None
        facts = [inspect_adapter(file, norms=read, ignore=self.ignore_unmatched) for file in self.files]
        if self.plot:
            from lora_diffusion.evaluation.norm_plot import save_norm_plot

            save_norm_plot(facts[0]["norms"], self.plot, title=facts[0]["name"])
        if self.json:
            print(json.dumps(facts[0] if len(facts) == 1 else facts))
        else:
            print("\n\n".join(describe_inspection(entry) for entry in facts))
        return 0


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write adapters in another dialect: the inputs first, the output file or folder last."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IN ... OUT", help_behavior_hint="")]
    """Adapters to read, and where to write: a .safetensors file for one, a folder for several."""
    to: Dialect
    """native (PEFT/diffusers), kohya (A1111, Forge, ComfyUI), or embedding (a learned token alone)."""
    dtype: WeightType = "keep"
    """Type of the written tensors."""
    force: bool = False
    """Replace files that are there."""
    without_tokens: bool = False
    """Leave learned tokens out."""
    card: bool = False
    """Also write a model card for the Hugging Face Hub beside each file."""
    ignore_unmatched: Patterns = ()
    """Keys that may be there without being understood."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        from lora_diffusion.workflows.adapters.convert import ConvertConfig, convert_files

        if len(self.paths) < 2:
            raise ConfigError("give at least one input and, last, the output: convert IN OUT --to kohya")
        how = ConvertConfig(
            to=self.to,
            dtype=self.dtype,
            force=self.force,
            without_tokens=self.without_tokens,
            card=self.card,
            ignore=self.ignore_unmatched,
        )
        done = convert_files(self.paths[:-1], self.paths[-1], how)
        facts = [{"from": str(x.source), "to": str(x.output), "rounding_error": x.rounding_error} for x in done]
        lines = [f"{x.output}: rounding changed the deltas by {x.rounding_error:.2g} of their norm" for x in done]
        print(json.dumps(facts) if self.json else "\n".join(lines))
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check an adapter file; the exit code is 0 if every check passes, else 1."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    base: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = ""
    """Base that it should fit: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    ignore_unmatched: Patterns = ()
    """Keys that may be there without being understood."""
    json: bool = False
    """Print the checks as JSON."""

    def run(self) -> int:
        with quiet_libraries():
            from lora_diffusion.workflows.adapters.verify import describe_checks, verify

            checks = verify(self.file, base=self.base, ignore=self.ignore_unmatched)
        print(json.dumps([vars(check) for check in checks]) if self.json else describe_checks(checks))
        return int(any(check.passed is False for check in checks))


@dataclass(frozen=True, kw_only=True)
class Library:
    """List a folder's adapters, from an index that reads each file once.

    `library pack` and `library unpack` store adapters that share directions in one file.
    """

    folder: Annotated[
        Path | None,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[FOLDER]", help_behavior_hint="(default: $LORA_DIFFUSION_LIBRARY, or the package's own)"
        ),
    ] = None
    """Folder of adapters; those in folders inside it are found too."""
    search: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: all)")] = ""
    """Words in name, trigger words or path."""
    family: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: all)")] = ""
    """sd1, sd2, sdxl, tiny-sd or tiny-sdxl."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> int:
        from lora_diffusion.library.search import default_folder, describe_library, entry_to_json, open_library, search

        library = open_library(self.folder or default_folder())
        entries = search(library, self.search, self.family)
        facts = [entry_to_json(entry) for entry in entries] if self.json else []
        print(json.dumps(facts) if self.json else describe_library(library, entries))
        return 0
