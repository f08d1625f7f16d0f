"""Flags of the commands that blend adapters: base, adapters, image settings and loading."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lora_diffusion.cli.flags import REPEATABLE, IgnoreUnmatched, describe_flag, given_settings, optional_flags
from lora_diffusion.config.generate import SHORT_NAMES, BaseConfig, GenerateConfig, LoadConfig
from lora_diffusion.config.preset import BlendEntry, Composition
from lora_diffusion.config.settings import EMBEDDED_BASE, Quantization, validate
from lora_diffusion.prompts.tags import extract_region, parse_weight

if TYPE_CHECKING:
    from lora_diffusion.library.references import AdapterResolver

Adapters = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="FILE[:WEIGHT][:OPTION=VALUE...]",
        help="Adapter file and its weight (default 1), with options as in `<lora:...>` tags, such as lbw=MIDD or "
        "start=0.2.",
        help_behavior_hint=REPEATABLE,
    ),
]
"""Adapter files with weights."""
BaseFlag = Annotated[
    str, describe_flag(BaseConfig, "base", hint=f"(default: {EMBEDDED_BASE}, or that of the preset or recipe)")
]
"""The base model; empty for the default."""
QuantizeFlag = Annotated[Quantization, describe_flag(BaseConfig, "quantize")]
"""Quantization of the base's linear layers."""
DEFAULT_QUANTIZATION: Quantization = BaseConfig.model_fields["quantize"].default


class GenerateFlags(
    optional_flags(GenerateConfig, SHORT_NAMES, hints={"prompt": "(required, unless a preset or image has one)"})
):
    """Flags of the image settings."""


class CompositionFlags(optional_flags(Composition, {"projection_strength": "projection"})):
    """Flags that say how the adapters are composed."""


@dataclass(frozen=True, kw_only=True)
class LoadFlags(optional_flags(LoadConfig, exclude=("ignore_unmatched",))):
    """Flags that say where adapters are found and how a blend is loaded."""

    ignore_unmatched: IgnoreUnmatched = ()

    def config(self) -> LoadConfig:
        """Return the settings that the flags describe."""
        return validate(LoadConfig, given_settings(self), source="flags")

    def resolver(self) -> "AdapterResolver":
        """Return what finds adapters in the library that the flags name."""
        from lora_diffusion.library.references import AdapterResolver

        return AdapterResolver(library_folder=given_settings(self).get("library"))


def parse_adapters(texts: tuple[str, ...]) -> tuple[BlendEntry, ...]:
    """Parse FILE[:WEIGHT][:OPTION=VALUE...] texts.

    Raises:
        ConfigError: If a weight or an option is invalid.
    """
    return tuple(parse_adapter(text) for text in texts)


def parse_adapter(text: str) -> BlendEntry:
    """Parse one FILE[:WEIGHT][:OPTION=VALUE...] text.

    Raises:
        ConfigError: If the weight or an option is invalid.
    """
    path, parts = _split_path(text)
    rest, region = extract_region(parts, source=f"--adapter {text}")
    return BlendEntry(path=path, weight=parse_weight(rest, source=f"--adapter {text}"), region=region)


def _split_path(text: str) -> tuple[str, list[str]]:
    """Split a text into the path of a file and the parts after it.

    Paths may contain colons, so the longest part that exists counts. If none exists, the path ends at the first part
    with a suffix, so that the error is about the right half.
    """
    parts = text.split(":")
    heads = [":".join(parts[:count]) for count in range(len(parts), 0, -1)]
    path = next((head for head in heads if Path(head).exists()), None)
    path = path or next((head for head in reversed(heads) if Path(head).suffix), parts[0])
    return path, text[len(path) + 1 :].split(":") if len(text) > len(path) else []
