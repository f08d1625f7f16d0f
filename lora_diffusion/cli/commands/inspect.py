"""The commands `inspect`, `convert`, `verify` and `library`, which work on adapter files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.cli.flags import (
    IgnoreUnmatched,
    Switch,
    describe_base_flag,
    given_settings,
    optional_flags,
    quiet_libraries,
)
from lora_diffusion.config.adapter_files import ConvertConfig
from lora_diffusion.config.settings import BASE_FORMS, validate
from lora_diffusion.errors import ConfigError


class ConvertFlags(optional_flags(ConvertConfig, exclude=("ignore_unmatched",))):
    """Flags of the conversion settings."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what adapter files contain, by reading their headers only."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")]
    """Adapter files, or folders that PEFT saved."""
    norms: Switch = False
    """Read the tensors too: show norms of the deltas, layers that are zero, NaN values, and hashes."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="PNG", help_behavior_hint="")] = None
    """Plot the norms into this file; for a single adapter."""
    ignore_unmatched: IgnoreUnmatched = ()
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        from lora_diffusion.workflows.adapters.inspect import describe_inspection, inspect_adapter

        if not self.files:
            raise ConfigError("give at least one adapter file")
        if self.plot and len(self.files) > 1:
            raise ConfigError(f"--plot takes a single adapter, but {len(self.files)} are given; plot them one by one")
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
    """Convert adapter files to another dialect, such as from PEFT's to kohya's.

    Example: `lora-diffusion convert lora.safetensors kohya.safetensors --to kohya`
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IN ... OUT", help_behavior_hint="")]
    """Adapter files to read; last, a .safetensors file to write, or a folder if there are several inputs."""
    settings: Annotated[ConvertFlags, tyro.conf.arg(name="")]
    ignore_unmatched: IgnoreUnmatched = ()
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        if len(self.paths) < 2:
            raise ConfigError("give at least one input and, last, the output: convert IN OUT --to kohya")
        given = {**given_settings(self.settings), "ignore_unmatched": self.ignore_unmatched}
        config = validate(ConvertConfig, given, source="convert")
        from lora_diffusion.workflows.adapters.convert import convert_files

        done = convert_files(self.paths[:-1], self.paths[-1], config)
        facts = [{"from": str(x.source), "to": str(x.output), "rounding_error": x.rounding_error} for x in done]
        lines = [f"{x.output}: rounding changed the deltas by {x.rounding_error:.2g} of their norm" for x in done]
        print(json.dumps(facts) if self.json else "\n".join(lines))
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check that an adapter file is complete and sound; the exit code is 1 if a check fails."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="")]
    """Adapter file, or folder that PEFT saved."""
    base: Annotated[
        str, describe_base_flag("Also check that the adapter fits this base model", hint="", forms=BASE_FORMS)
    ] = ""
    ignore_unmatched: IgnoreUnmatched = ()
    json: Switch = False
    """Print the checks as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        with quiet_libraries():
            from lora_diffusion.workflows.adapters.verify import describe_checks, verify

            checks = verify(self.file, base=self.base, ignore=self.ignore_unmatched)
        print(json.dumps([vars(check) for check in checks]) if self.json else describe_checks(checks))
        return int(any(check.passed is False for check in checks))


@dataclass(frozen=True, kw_only=True)
class Library:
    """List the adapters in a folder, from an index that reads each file only once.

    `library pack` and `library unpack` store many adapters in one file with shared factors.
    """

    folder: Annotated[
        Path | None,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[FOLDER]", help_behavior_hint="(default: $LORA_DIFFUSION_LIBRARY, or the built-in adapters)"
        ),
    ] = None
    """Folder of adapters, including its subfolders."""
    search: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: all)")] = ""
    """Show only adapters whose name, trigger words or path contain these words."""
    family: Annotated[
        str,
        tyro.conf.arg(
            metavar="NAME",
            help=f"Show only adapters for this family of base models: {', '.join(FAMILIES)}.",
            help_behavior_hint="(default: all)",
        ),
    ] = ""
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        from lora_diffusion.library.search import default_folder, describe_library, entry_to_json, open_library, search

        library = open_library(self.folder or default_folder())
        entries = search(library, self.search, self.family)
        facts = [entry_to_json(entry) for entry in entries] if self.json else []
        print(json.dumps(facts) if self.json else describe_library(library, entries))
        return 0
