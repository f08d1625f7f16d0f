"""The command line: a thin skin over the library. Heavy libraries are imported when a command runs, not before."""

import contextlib
import json
import logging
import os
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from lora_diffusion.config import (
    EMBEDDED_BASE,
    Dialect,
    GenerateConfig,
    Settings,
    TrainConfig,
    WeightType,
    read_toml,
    validate,
)
from lora_diffusion.errors import ConfigError, LoRADiffusionError
from lora_diffusion.preset import BlendEntry, Composition
from lora_diffusion.tags import parse_weight, take_region

REPEATABLE = "(repeatable)"
Adapters = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="FILE[:WEIGHT][:OPTION=VALUE...]", help_behavior_hint=REPEATABLE),
]
Changes = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint=REPEATABLE),
]
Patterns = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="PATTERN", help_behavior_hint=REPEATABLE),
]
BaseFlag = Annotated[
    str, tyro.conf.arg(help_behavior_hint=f"(default: {EMBEDDED_BASE}, or that of the preset or recipe)")
]


def optional_flags(kind: type[Settings]) -> type[Any]:
    """A dataclass with one optional flag for each setting: names, types, help and defaults are the settings' own."""
    fields: list[tuple[str, Any, Any]] = []
    for name, info in kind.model_fields.items():
        hint = "(required)" if info.is_required() else f"(default: {shown(info.default)})"
        if info.annotation is bool:
            switch = tyro.conf.arg(help=info.description, help_behavior_hint="")
            fields.append((name, Annotated[bool, tyro.conf.FlagCreatePairsOff, switch], False))
            continue
        argument = tyro.conf.arg(help=info.description, metavar=metavar(info.annotation), help_behavior_hint=hint)
        fields.append((name, Annotated[info.annotation | None, argument], None))
    return make_dataclass(f"{kind.__name__}Flags", fields, kw_only=True, frozen=True)


def metavar(annotation: Any) -> str:
    """What help shows in place of a value."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return "INT" if "int" in str(annotation) else "NUMBER" if "float" in str(annotation) else "TEXT"


def shown(default: object) -> str:
    """A default as a user reads it."""
    if isinstance(default, tuple):
        return ", ".join(map(str, default)) or "none"
    return "the base's own" if default is None else str(default) or "none"


def settings_table(kind: type[Settings]) -> str:
    """The settings of a TOML file as lines of help."""
    rows = [
        f"  {name}: {info.description} ({'required' if info.is_required() else shown(info.default)})"
        for name, info in kind.model_fields.items()
    ]
    return "\n".join(rows)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an adapter from captioned pictures."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml")]
    """TOML file with the run's settings."""
    set: Changes = ()
    """Change one setting of the file."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        config = read_toml(self.config, TrainConfig, parse_changes(self.set))
        with quiet():
            from lora_diffusion.training.loop import train

            result = train(config)
        if not result.is_main_process:
            return
        facts = {"adapter": str(result.path), "first_loss": result.first_loss, "last_loss": result.last_loss}
        text = f"{result.path}: loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
        print(json.dumps(facts) if self.json else text)


GenerateFlags = optional_flags(GenerateConfig)
CompositionFlags = optional_flags(Composition)


def given(flags: Any) -> dict[str, Any]:
    """The flags that were set."""
    return {key: value for key, value in vars(flags).items() if value is not None and value is not False}


@dataclass(frozen=True, kw_only=True)
class MeansFlags:
    """Where adapters are looked for, and what is done to their weights."""

    library: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: $LORA_DIFFUSION_LIBRARY, or the package's own)"),
    ] = None
    """Folder in which adapters are found by name, for tags, and by hash."""
    block_presets: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """An `lbwpresets.txt`: block vectors by name, for lbw=NAME."""
    balance: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """Scale the weights so that equal ones mean equal strength."""
    low_memory: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """Take the base's own values back from its files afterwards, and keep no copies in memory."""
    ignore_unmatched: Patterns = ()
    """Keys of adapter files that may be there without being understood."""

    def means(self) -> Any:
        from lora_diffusion.commands import Means
        from lora_diffusion.references import Shelf

        return Means(
            shelf=Shelf(library_folder=self.library),
            ignore=self.ignore_unmatched,
            block_presets=self.block_presets,
            balance=self.balance,
            low_memory=self.low_memory,
        )


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make pictures from a base and any blend of adapters.

    Tags in the prompt call adapters of the library: `<lora:neon:0.8:lbw=MIDD:start=0.2:stop=0.8>`.
    """

    settings: Annotated[GenerateFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    where: Annotated[MeansFlags, tyro.conf.arg(name="")]
    base: BaseFlag = ""
    """`tiny-sd`, a folder in diffusers' layout, or a hub id."""
    adapter: Adapters = ()
    """Adapter and its weight, 1 if not given; options may follow, as in a prompt's tags."""
    preset: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Blend preset (JSON) whose base, adapters and settings are used."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="IMAGE", help_behavior_hint="")] = None
    """Picture to be made again: one of ours, or one of A1111 or Forge, whose adapters are found by their hashes."""
    output: Path = Path("outputs")
    """Folder for the PNGs."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        with quiet():
            from lora_diffusion.commands import generate_files

            means = self.where.means()
            written = generate_files(self.plan(means.shelf), self.output, means)
        for note in written.notes:
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps([str(p) for p in written.paths]) if self.json else "\n".join(map(str, written.paths)))

    def plan(self, shelf: Any) -> Any:
        """What to make, from the flags."""
        from lora_diffusion.plans import Plan, preset_plan, replay_plan

        settings, composition = given(self.settings), given(self.composition)
        adapters = parse_adapters(self.adapter)
        if self.from_:
            if settings or composition or adapters or self.preset or self.where.balance:
                raise ConfigError("--from makes a picture again as it was; give only --base, --library and --output")
            return replay_plan(self.from_, base=self.base, shelf=shelf)
        if self.preset:
            return preset_plan(
                self.preset, base=self.base, settings=settings, composition=composition, adapters=adapters
            )
        return Plan(
            base=self.base or EMBEDDED_BASE,
            entries=adapters,
            settings=validate(GenerateConfig, settings, source="generate"),
            composition=validate(Composition, composition, source="generate"),
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Save, list, show or check blend presets.

    `save FILE` writes the adapters and settings given; `list [FOLDER]`; `show FILE`; `check FILE` looks for every
    adapter by path and hash and exits with 1 if one is missing or has changed.
    """

    action: Annotated[
        Literal["save", "list", "show", "check"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="save|list|show|check", help_behavior_hint=""),
    ]
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]", help_behavior_hint="")] = Path()
    """File of the preset, or folder to list."""
    settings: Annotated[GenerateFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    where: Annotated[MeansFlags, tyro.conf.arg(name="")]
    adapter: Adapters = ()
    """Adapter to save, with its weight and options."""
    base: BaseFlag = ""
    """Base to save: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="IMAGE", help_behavior_hint="")] = None
    """Picture whose blend and settings are saved."""
    name: str = ""
    """Name of the preset; the file's if empty."""
    description: str = ""
    """What it is good for."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a preset that is there."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print as JSON."""

    def run(self) -> int:
        with quiet():
            return {"save": self.save, "list": self.list, "show": self.show, "check": self.check}[self.action]()

    def save(self) -> int:
        from lora_diffusion.commands import save_plan
        from lora_diffusion.plans import settings_plan

        settings, composition = given(self.settings), given(self.composition)
        means = self.where.means()
        plan = settings_plan(
            self.from_,
            base=self.base,
            settings=settings,
            composition=composition,
            adapters=parse_adapters(self.adapter),
            shelf=means.shelf,
        )
        preset = save_plan(plan, self.path, means, name=self.name, description=self.description, force=self.force)
        print(preset.model_dump_json(exclude_defaults=True) if self.json else f"{self.path}: saved")
        return 0

    def list(self) -> int:
        from lora_diffusion.preset_files import list_presets

        rows = list_presets(self.path)
        if self.json:
            print(json.dumps([{"file": str(p), "name": getattr(found, "name", "")} for p, found in rows]))
            return 0
        for path, found in rows:
            text = found if isinstance(found, str) else f"{found.name}: " + ", ".join(e.name for e in found.adapters)
            print(f"{path}  {text}")
        return 0

    def show(self) -> int:
        from lora_diffusion.preset_files import describe_preset, read_preset

        preset = read_preset(self.path)
        print(preset.model_dump_json(exclude_defaults=True) if self.json else describe_preset(preset))
        return 0

    def check(self) -> int:
        from lora_diffusion.preset_files import check_preset

        checks = check_preset(self.path, self.where.means().shelf)
        if self.json:
            print(json.dumps([{"what": what, "problem": problem} for what, problem in checks]))
        else:
            print(
                "\n".join(
                    f"{'ok' if not problem else 'NO':<4}{what}{problem and ': '}{problem}" for what, problem in checks
                )
            )
        return int(any(problem for _, problem in checks))


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge a blend into a checkpoint folder."""

    output: Path
    """Folder to write; must not exist or be empty."""
    where: Annotated[MeansFlags, tyro.conf.arg(name="")]
    base: str = EMBEDDED_BASE
    """`tiny-sd`, a folder in diffusers' layout, or a hub id."""
    adapter: Adapters = ()
    """Adapter and its weight, 1 if not given; options may follow, as in a prompt's tags."""
    precision: WeightType = "keep"
    """Type of the written weights; `keep` writes what the base has."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        with quiet():
            from lora_diffusion.commands import merge_files

            means = self.where.means()
            report = merge_files(self.base, parse_adapters(self.adapter), self.output, self.precision, means)
        facts = {
            "output": str(report.output),
            "merged_modules": report.merged_modules,
            "rounding_error": report.rounding_error,
        }
        text = (
            f"{report.output}: {report.merged_modules} modules merged; "
            f"rounding changed the delta by {report.rounding_error:.2%}"
        )
        print(json.dumps(facts) if self.json else text)


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
        from lora_diffusion.inspection import describe_inspection, inspect_adapter

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
        from lora_diffusion.conversion import Conversion, convert_files

        if len(self.paths) < 2:
            raise ConfigError("give at least one input and, last, the output: convert IN OUT --to kohya")
        how = Conversion(
            to=self.to,
            dtype=self.dtype,
            force=self.force,
            without_tokens=self.without_tokens,
            card=self.card,
            ignore=self.ignore_unmatched,
        )
        done = convert_files(self.paths[:-1], self.paths[-1], how)
        facts = [{"from": str(x.source), "to": str(x.output), "rounding_error": x.rounding_error} for x in done]
        lines = [f"{x.output}: rounding changed the tensors by {x.rounding_error:.2g} of their norm" for x in done]
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
        with quiet():
            from lora_diffusion.verification import describe_checks, verify

            checks = verify(self.file, base=self.base, ignore=self.ignore_unmatched)
        print(json.dumps([vars(check) for check in checks]) if self.json else describe_checks(checks))
        return int(any(check.passed is False for check in checks))


@dataclass(frozen=True, kw_only=True)
class Library:
    """List a folder's adapters, from an index that reads each file once."""

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
        from lora_diffusion.library import default_folder, describe_library, entry_facts, open_library, search

        library = open_library(self.folder or default_folder())
        entries = search(library, self.search, self.family)
        facts = [entry_facts(entry) for entry in entries] if self.json else []
        print(json.dumps(facts) if self.json else describe_library(library, entries))
        return 0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole story on the embedded base: train, blend, merge, compare."""

    output: Path = Path("demo")
    """Folder for the grid, the adapter and the merged checkpoint; an earlier demo there is replaced."""
    steps: int = 0
    """Training steps; 0 takes the demo's own number."""

    def run(self) -> None:
        with quiet():
            from lora_diffusion.demo import run_demo

            run_demo(self.output, steps=self.steps, say=print)


Train.__doc__ = f"{Train.__doc__}\n\nSettings of the TOML file:\n{settings_table(TrainConfig)}"
COMMANDS = {
    "train": Train,
    "generate": Generate,
    "preset": Preset,
    "merge": Merge,
    "inspect": Inspect,
    "convert": Convert,
    "verify": Verify,
    "library": Library,
    "demo": Demo,
}


def parse_adapters(texts: tuple[str, ...]) -> tuple[BlendEntry, ...]:
    """FILE[:WEIGHT[:OPTION=VALUE]...] each. Raises ConfigError for a weight that cannot be read."""
    return tuple(parse_adapter(text) for text in texts)


def parse_adapter(text: str) -> BlendEntry:
    path, parts = split_file(text)
    rest, region = take_region(parts, source=f"--adapter {text}")
    return BlendEntry(path=path, weight=parse_weight(rest, source=f"--adapter {text}"), region=region)


def split_file(text: str) -> tuple[str, list[str]]:
    """A file and the parts after it: the longest that exists, as a path may have colons of its own, else up to the
    first that ends in a suffix, so that the mistake is found in the right half."""
    parts = text.split(":")
    heads = [":".join(parts[:count]) for count in range(len(parts), 0, -1)]
    path = next((head for head in heads if Path(head).exists()), None)
    path = path or next((head for head in reversed(heads) if Path(head).suffix), parts[0])
    return path, text[len(path) + 1 :].split(":") if len(text) > len(path) else []


def parse_changes(texts: tuple[str, ...]) -> dict[str, object]:
    """KEY=VALUE each, the value as TOML or, failing that, as text. Raises ConfigError."""
    changes: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, e.g. --set steps=200")
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value
    return changes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' notices off the terminal; what matters reaches the user as our own errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for bad input, with one sentence on standard error."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=arguments,
        prog="lora-diffusion",
        description="Train, blend, merge and convert LoRA adapters for Stable Diffusion.",
    )
    try:
        return command.run() or 0
    except LoRADiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
