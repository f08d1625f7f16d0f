"""Command-line flags made from settings classes, flags that several commands share, and their parsing."""

import contextlib
import logging
import os
import tomllib
import warnings
from collections.abc import Collection, Generator, Mapping
from dataclasses import make_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import tyro

from lora_diffusion.config.generate import LoadConfig
from lora_diffusion.config.settings import CHECKPOINT_FORMS, Settings, deep_merge, nested_model
from lora_diffusion.errors import ConfigError

NO_NAMES: Mapping[str, str] = MappingProxyType({})
REPEATABLE = "(repeatable)"
"""What help shows in place of a default for a flag that may be given several times."""


def setting_help(kind: type[Settings], name: str) -> str:
    """Return the help text of a setting: its docstring in the settings class, as one line."""
    return " ".join((kind.model_fields[name].description or "").split())


def describe_flag(
    kind: type[Settings], name: str, *, hint: str | None = None, short_name: str | None = None, metavar: str = ""
) -> Any:
    """Return tyro's description of the flag of a setting, with the help text of the settings class.

    Args:
        kind: The settings class.
        name: The setting.
        hint: What help shows after the text; the default by default.
        short_name: Another name of the flag, without dashes.
        metavar: Placeholder for the value; chosen by the type of the setting if empty.
    """
    info = kind.model_fields[name]
    if hint is None:
        hint = "(required)" if info.is_required() else format_hint(info.get_default(call_default_factory=True))
    return tyro.conf.arg(
        help=setting_help(kind, name),
        metavar=metavar or make_metavar(info.annotation),
        help_behavior_hint=hint,
        aliases=(f"--{short_name}",) if short_name else None,
    )


def describe_base_flag(about: str, *, hint: str, forms: str = CHECKPOINT_FORMS, metavar: str = "BASE") -> Any:
    """Return tyro's description of a flag that names a base model or checkpoint.

    Args:
        about: What the base is for; the help text goes on with the ways to name it.
        hint: What help shows after the text.
        forms: The ways to name it.
        metavar: Placeholder for the value.
    """
    return tyro.conf.arg(help=f"{about}: {forms}.", metavar=metavar, help_behavior_hint=hint)


def optional_flags(
    kind: type[Settings],
    short_names: Mapping[str, str] = NO_NAMES,
    *,
    exclude: Collection[str] = (),
    hints: Mapping[str, str] = NO_NAMES,
) -> type[Any]:
    """Return a dataclass with one optional flag per setting, documented by the settings class.

    Numbers and choices are left as text, so that the settings class alone checks them and words the errors; pass
    `given_settings(flags)` to `validate`.

    Args:
        kind: The settings class.
        short_names: Further names of flags, by setting.
        exclude: Settings without a flag.
        hints: What help shows in place of the default, by setting.
    """
    fields: list[tuple[str, Any, Any]] = []
    for name, info in kind.model_fields.items():
        if name in exclude:
            continue
        if info.annotation is bool:
            switch = tyro.conf.arg(help=setting_help(kind, name), help_behavior_hint="")
            fields.append((name, Annotated[bool, tyro.conf.FlagCreatePairsOff, switch], False))
            continue
        argument = describe_flag(kind, name, hint=hints.get(name), short_name=short_names.get(name))
        fields.append((name, Annotated[make_flag_type(info.annotation) | None, argument], None))
    return make_dataclass(f"{kind.__name__}Flags", fields, kw_only=True, frozen=True)


def given_settings(flags: Any) -> dict[str, Any]:
    """Return the settings that were given on the command line."""
    values = cast("dict[str, Any]", vars(flags))
    return {key: value for key, value in values.items() if value is not None and value is not False}


def make_flag_type(annotation: Any) -> Any:
    """Return the type as which tyro reads a setting: text, a path, or a list of texts."""
    if "tuple" in str(annotation):
        return tuple[str, ...]
    return Path if "Path" in str(annotation) else str


def make_metavar(annotation: Any) -> str:
    """Return the placeholder that help shows for a value."""
    for choice in (annotation, *get_args(annotation)):
        if get_origin(choice) is Literal:
            return "|".join(map(str, get_args(choice)))
    text = str(annotation)
    if "tuple" in text:
        return "[TEXT ...]"
    return next((metavar for part, metavar in METAVARS.items() if part in text), "TEXT")


METAVARS = {"Path": "PATH", "int": "INT", "float": "NUMBER"}
"""Placeholders by a part of the type's name."""


def format_hint(default: object) -> str:
    """Format a default for help; empty for None, because the help text of such a setting explains its absence."""
    return "" if default is None else f"(default: {format_default(default)})"


def format_default(default: object) -> str:
    """Format a default value as text."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Mapping):
        return ", ".join(map(str, cast("Mapping[object, object]", default))) or "none"
    if isinstance(default, tuple | list):
        return ", ".join(map(str, cast("tuple[object, ...]", default))) or "none"
    return str(default) or "none"


def settings_table(kind: type[Settings], prefix: str = "") -> str:
    """Describe the settings of a TOML file as lines of help, with each section's settings under its name."""
    rows: list[str] = []
    for name, info in kind.model_fields.items():
        inner = nested_model(kind, name)
        if inner is not None:
            about = (inner.__doc__ or "").strip()
            rows += [f"\n  [{prefix}{name}] {about}", settings_table(cast("type[Settings]", inner), f"{prefix}{name}.")]
            continue
        value = info.get_default(call_default_factory=True)
        hint = "(required)" if info.is_required() else format_hint(value)
        choices = make_metavar(info.annotation)
        title = f"{name} ({choices})" if "|" in choices else name
        rows.append(f"  {title}: {setting_help(kind, name)} {hint}".rstrip())
    return "\n".join(rows)


Changes = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint=REPEATABLE),
]
"""Changes of single settings of a TOML file."""
IgnoreUnmatched = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    describe_flag(LoadConfig, "ignore_unmatched", hint=REPEATABLE, metavar="PATTERN"),
]
"""Keys of adapter files to ignore."""
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]
"""A flag without a value, which is off by default."""


def parse_changes(texts: tuple[str, ...]) -> dict[str, Any]:
    """Parse KEY=VALUE texts into a nested table.

    KEY may be dotted (`optimizer.learning_rate`); VALUE is TOML or, failing that, plain text.

    Raises:
        ConfigError: If a text has no `=`.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE, e.g. --set steps=200")
        nested: Any = parse_toml_value(value)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        changes = deep_merge(changes, nested)
    return changes


def parse_toml_value(text: str) -> Any:
    """Parse a TOML value; return the text itself if it is not TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


@contextlib.contextmanager
def quiet_libraries() -> Generator[None]:
    """Silence warnings and log messages of other libraries; errors are reported by this library's own exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("accelerate", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
