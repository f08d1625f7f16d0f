"""Flags that several commands share, derived from the settings; and the texts that follow them."""

import contextlib
import logging
import os
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import make_dataclass
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import tyro

from lora_diffusion.config.settings import Settings, deep_merge, nested_model
from lora_diffusion.errors import ConfigError

REPEATABLE = "(repeatable)"
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


def optional_flags(kind: type[Settings], short_names: Mapping[str, str] | None = None) -> type[Any]:
    """Return a dataclass with one optional flag for each setting, documented by it; `short_names` are further flags."""
    fields: list[tuple[str, Any, Any]] = []
    for name, info in kind.model_fields.items():
        hint = "(required)" if info.is_required() else f"(default: {format_default(info.default)})"
        if info.annotation is bool:
            switch = tyro.conf.arg(help=info.description, help_behavior_hint="")
            fields.append((name, Annotated[bool, tyro.conf.FlagCreatePairsOff, switch], False))
            continue
        short = (short_names or {}).get(name)
        argument = tyro.conf.arg(
            help=info.description,
            metavar=make_metavar(info.annotation),
            help_behavior_hint=hint,
            aliases=(f"--{short}",) if short else None,
        )
        fields.append((name, Annotated[info.annotation | None, argument], None))
    return make_dataclass(f"{kind.__name__}Flags", fields, kw_only=True, frozen=True)


def make_metavar(annotation: Any) -> str:
    """Return the placeholder that help shows for a value."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return "INT" if "int" in str(annotation) else "NUMBER" if "float" in str(annotation) else "TEXT"


def format_default(default: object) -> str:
    """Format a default for help."""
    if isinstance(default, tuple):
        return ", ".join(map(str, default)) or "none"
    return "the base's own" if default is None else str(default) or "none"


def settings_table(kind: type[Settings], prefix: str = "") -> str:
    """The settings of a TOML file as lines of help, those of a section under its name."""
    rows: list[str] = []
    for name, info in kind.model_fields.items():
        inner = nested_model(kind, name)
        if inner is not None:
            about = (inner.__doc__ or "").strip()
            rows += [f"\n  [{prefix}{name}] {about}", settings_table(cast("type[Settings]", inner), f"{prefix}{name}.")]
            continue
        value = info.get_default(call_default_factory=True)
        default = "required" if info.is_required() else "not set" if value is None else format_default(value)
        rows.append(f"  {name}: {info.description} ({default})")
    return "\n".join(rows)


def parse_changes(texts: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE each, KEY perhaps with its section, the value as TOML or, failing that, as text. Raises ConfigError."""
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
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' notices; errors reach the user as our own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("accelerate", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
