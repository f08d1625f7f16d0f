"""The base class of all settings, reading them from TOML, and error messages for invalid settings.

Settings are declared once: flags, file format, help texts, validation and the record in every output derive from them.
This package imports no heavy library, so that help is fast.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_diffusion.errors import ConfigError

Precision = Literal["no", "fp16", "bf16"]
"""Mixed precision, in Accelerate's names."""
Dialect = Literal["native", "kohya", "embedding"]
"""Dialects of adapter files that can be written."""
Quantization = Literal["none", "nf4", "fp4", "int8"]
"""Quantization of a base's linear layers: none, 4 bits (nf4, fp4) or 8 bits (int8)."""
Positive = Annotated[int, Field(gt=0)]
"""An integer of at least 1."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number."""

TYPE_TAG = re.compile(r"constrained-\w+|(tuple|list|dict)\[.*")
"""Parts of an error's location by which pydantic distinguishes the types of a union."""

EMBEDDED_BASE = "tiny-sd"
"""Name of the base model that is embedded in the package."""
BASE_FORMS = "`tiny-sd` (embedded), a folder in diffusers' layout, or a hub id"
"""The ways to name a base model that is loaded, for help texts."""
CHECKPOINT_FORMS = "`tiny-sd` (embedded), a folder in diffusers' layout, a single .safetensors file, or a hub id"
"""The ways to name a checkpoint whose weights are read, for help texts."""
BaseName = Annotated[str, Field(description=f"Base model: {BASE_FORMS}.")]
"""Name of a base model to load."""
CheckpointName = Annotated[str, Field(description=f"Checkpoint: {CHECKPOINT_FORMS}.")]
"""Name of a checkpoint whose weights are read."""
BaseQuantization = Annotated[
    Quantization,
    Field(
        description="Load the base's linear layers in 4 bits (nf4, fp4) or 8 bits (int8) to save GPU memory; needs "
        "bitsandbytes."
    ),
]
"""Quantization of a base model when it is loaded."""
IgnoredKeys = Annotated[
    tuple[str, ...],
    Field(description="Pattern of keys in adapter files that are ignored instead of reported as an error."),
]
"""Patterns of tensor keys that an adapter file may contain although they are not understood."""


class Settings(BaseModel):
    """Base class of settings: immutable, with an error for unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        defer_build=True,  # validators are built on first use, which keeps help fast
    )


Model = TypeVar("Model", bound=Settings)
"""A settings class."""


def read_toml(path: str | os.PathLike[str], kind: type[Model], changes: Mapping[str, Any] | None = None) -> Model:
    """Read settings from a TOML file.

    Args:
        path: The file; relative paths in it start at its folder.
        kind: The settings class.
        changes: Settings that override those of the file, by section; relative paths start at the working directory.

    Raises:
        ConfigError: If the file cannot be read or settings are invalid; the message lists all mistakes.
    """
    path, changes = Path(path), changes or {}
    table = resolve_paths(read_table(path), kind, path.parent)
    return validate(kind, deep_merge(table, changes), source=f"{path} with changes" if changes else str(path))


def deep_merge(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `table` with `changes` merged into it, nested tables included."""
    result = dict(table)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = deep_merge(cast("Mapping[str, Any]", inner), cast("Mapping[str, Any]", value)) if both else value
    return result


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file without validating it.

    Raises:
        ConfigError: If the file cannot be read.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a TOML file with the run's settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a TOML text file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def validate(kind: type[Model], table: Mapping[str, Any], *, source: str) -> Model:
    """Validate a table as settings.

    Args:
        kind: The settings class.
        table: Settings by name, with a nested table for each section.
        source: Where the table comes from, for the error message.

    Raises:
        ConfigError: If settings are invalid; the message lists all mistakes and suggests keys for unknown ones.
    """
    try:
        return kind.model_validate(dict(table))
    except ValidationError as error:
        raise ConfigError(f"{source}: {format_validation_error(error, kind)}") from None


def resolve_paths(table: Mapping[str, Any], kind: type[BaseModel], folder: Path) -> dict[str, Any]:
    """Return the table with relative path settings joined to `folder`, nested settings included.

    In settings that are tables with paths as keys, the keys are resolved.
    """

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in cast("list[Any]", value)]
        if isinstance(value, Mapping):
            return {resolve(path): given for path, given in cast("Mapping[Any, Any]", value).items()}
        return os.path.normpath(folder / value) if isinstance(value, str) else value

    def resolve_setting(key: str, value: Any) -> Any:
        inner = nested_model(kind, key)
        if inner is None:
            return resolve(value) if key in paths else value
        if not isinstance(value, Mapping):
            value = {getattr(inner, "shorthand", key): value}
        return resolve_paths(cast("Mapping[str, Any]", value), inner, folder)

    holders: tuple[Any, ...] = (Path, Path | None, tuple[Path, ...], dict[Path, float])
    paths = {name for name, info in kind.model_fields.items() if info.annotation in holders}
    return {key: resolve_setting(key, value) for key, value in table.items()}


def nested_model(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the settings class of a nested setting, or None for any other setting."""
    info = kind.model_fields.get(name)
    annotation = info.annotation if info else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def dotted_names(kind: type[BaseModel]) -> list[str]:
    """List the names of all settings, those of sections as `section.setting`."""
    names: list[str] = []
    for name in kind.model_fields:
        inner = nested_model(kind, name)
        names += [name] if inner is None else [f"{name}.{leaf}" for leaf in dotted_names(inner)]
    return names


def format_validation_error(error: ValidationError, kind: type[BaseModel]) -> str:
    """Describe every mistake of a validation, in one sentence each."""
    found: dict[tuple[Any, ...], str] = {}
    for item in error.errors():
        names = tuple(part for part in item["loc"] if not TYPE_TAG.fullmatch(str(part)))
        place = names if names != item["loc"] else (*names, item["msg"])
        found.setdefault(place, format_mistake({**item, "loc": names}, kind))
    return "; ".join(found.values())


def format_mistake(item: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """Describe one mistake, with the name of the setting, its value and what was expected."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {suggest_key(key, kind)}"
    if item["type"] == "missing":
        return f"{key!r} is missing and has no default"
    reason = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    reason = reason.removeprefix("value error, ")
    if isinstance(item["input"], Mapping):  # an error about a section as a whole
        return f"{key}: {reason}" if key else reason
    return f"{key!r} is {item['input']!r}: {reason}" if key else reason


def suggest_key(key: str, kind: type[BaseModel]) -> str:
    """Suggest the nearest known setting, or list all known settings of the key's section."""
    known = dotted_names(kind)
    leaves = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1)
    ]
    if near:
        return f"did you mean {near[0]!r}?"
    prefix = key.rpartition(".")[0]
    return f"known keys: {', '.join(name for name in known if name.rpartition('.')[0] == prefix)}"
