"""The settings of each command, declared once.

Flags, file format, help texts, validation and the record in every output derive from these types. This module
imports no heavy library, so that help comes at once.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_diffusion.errors import ConfigError

Scheduler = Literal["base", "ddim", "euler", "euler-ancestral", "dpm++"]
Precision = Literal["no", "fp16", "bf16"]
WeightType = Literal["keep", "float32", "float16", "bfloat16"]
Dialect = Literal["native", "kohya", "embedding"]
Positive = Annotated[int, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

EMBEDDED_BASE = "tiny-sd"
"""The name by which every command knows the base that comes with the package."""


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        defer_build=True,  # validators are built when they are first needed, which help never does
    )


class GenerateConfig(Settings):
    """What picture to make. The same settings, base and blend give the same pixels on the same machine."""

    prompt: str
    """What the picture shows."""
    negative_prompt: str = ""
    """What it should not show."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the first picture; each further one adds 1."""
    steps: Positive = 20
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 4.0
    """Classifier-free guidance scale; 1 and below turn guidance off."""
    width: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Width in pixels."""
    height: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Height in pixels."""
    scheduler: Scheduler = "base"
    """Sampler; `base` is the one that the base brings."""
    count: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Number of pictures."""


class MergeConfig(Settings):
    """How a merged checkpoint is written."""

    precision: WeightType = "keep"
    """Type of the written weights; `keep` writes what the base has."""
    shard_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest weight file of a folder in units of 10^9 bytes; as the base's if left out."""
    stochastic_seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """Seed for rounding to 16 bits at random, right in the mean; to the nearest if left out."""
    allow_overflow: bool = False
    """Write values beyond the range of the type as its largest ones, instead of refusing them."""


class TrainConfig(Settings):
    """One training run, as read from a TOML file."""

    data: Path
    """Folder with pictures, each with a caption in a .txt file of the same name."""
    output: Path
    """The adapter file to write (.safetensors)."""
    base: str = EMBEDDED_BASE
    """Base to train on: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    name: str = ""
    """Name of the adapter; the output's file name if empty."""
    trigger_words: tuple[str, ...] = ()
    """Words that call the adapter in a prompt; recorded in the file."""
    rank: Positive = 8
    """Rank of the two factors."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the factors' input that is dropped in training."""
    unet_targets: tuple[str, ...] = ("attention",)
    """Named sets (attention, cross-attention, feed-forward, projections, convolutions, all) or patterns."""
    text_encoder_targets: tuple[str, ...] = ("attention",)
    """Named sets (attention, feed-forward, all) or patterns; empty trains the UNet only."""
    steps: Positive = 400
    """Optimizer steps."""
    batch_size: Positive = 4
    """Pictures per step and process."""
    gradient_accumulation: Positive = 1
    """Batches whose gradients are summed into one optimizer step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak learning rate of the UNet's factors (AdamW)."""
    text_encoder_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Peak learning rate of the text encoders' factors; the UNet's if not given."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up before the cosine decay."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of captions replaced by the empty prompt, which keeps guidance working."""
    mixed_precision: Precision = "no"
    """Accelerate's mixed precision; trainable parameters are float32 always."""
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] | None = None
    """Pictures are scaled and centre-cropped to this square."""
    save_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between intermediate adapters (`name-step00000100.safetensors`); 0 for none."""
    save_precision: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type of the saved factors."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights, data order, noise and dropout."""


Model = TypeVar("Model", bound=Settings)


def read_toml(path: Path, kind: type[Model], changes: Mapping[str, Any] | None = None) -> Model:
    """The settings in a TOML file, with `changes` over them.

    Relative paths in the file are taken from its own folder, those in `changes` from the present one. Raises
    ConfigError with all mistakes at once.
    """
    changes = changes or {}
    table = anchored(read_table(path), kind, path.parent)
    return validate(kind, {**table, **changes}, source=f"{path} with changes" if changes else str(path))


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file as it is. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a TOML file with the run's settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a TOML text file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def validate(kind: type[Model], table: Mapping[str, Any], *, source: str) -> Model:
    """`table` as settings of `kind`; raises ConfigError that names every wrong key and the nearest right one."""
    try:
        return kind.model_validate(dict(table))
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error, kind)}") from None


def anchored(table: Mapping[str, Any], kind: type[BaseModel], folder: Path) -> dict[str, Any]:
    """The table with the values of path settings, or of lists of paths, joined to `folder`."""
    holders: tuple[Any, ...] = (Path, tuple[Path, ...])
    paths = {name for name, info in kind.model_fields.items() if info.annotation in holders}

    def joined(value: Any) -> Any:
        if isinstance(value, list):
            return [joined(item) for item in cast("list[Any]", value)]
        return os.path.normpath(folder / value) if isinstance(value, str) else value

    return {key: joined(value) if key in paths else value for key, value in table.items()}


def describe(error: ValidationError, kind: type[BaseModel]) -> str:
    """All mistakes of a validation in one sentence each."""
    return "; ".join(describe_one(dict(item), kind) for item in error.errors())


def describe_one(item: Mapping[str, Any], kind: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(kind.model_fields)}"
        return f"unknown key {key!r}; {hint}"
    if item["type"] == "missing":
        return f"{key!r} is missing; it has no default"
    reason = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{key!r} is {item['input']!r}: {reason}" if key else reason
