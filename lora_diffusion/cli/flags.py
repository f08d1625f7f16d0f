"""Flags that several commands share, derived from the settings; and the texts that follow them."""

import contextlib
import logging
import os
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from lora_diffusion.config import EMBEDDED_BASE, GenerateConfig, Settings
from lora_diffusion.errors import ConfigError
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
