"""Flags of the commands that blend, derived from the settings; and adapters as they follow `--adapter`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lora_diffusion.cli.flags import REPEATABLE, Patterns, optional_flags
from lora_diffusion.config.generate import SHORT_NAMES, GenerateConfig
from lora_diffusion.config.preset import BlendEntry, Composition
from lora_diffusion.config.settings import EMBEDDED_BASE
from lora_diffusion.prompts.tags import extract_region, parse_weight

Adapters = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="FILE[:WEIGHT][:OPTION=VALUE...]", help_behavior_hint=REPEATABLE),
]
BaseFlag = Annotated[
    str, tyro.conf.arg(help_behavior_hint=f"(default: {EMBEDDED_BASE}, or that of the preset or recipe)")
]
GenerateFlags = optional_flags(GenerateConfig, SHORT_NAMES)
CompositionFlags = optional_flags(Composition)


def set_flags(flags: Any) -> dict[str, Any]:
    """Return the flags that were set."""
    return {key: value for key, value in vars(flags).items() if value is not None and value is not False}


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """Flags that say where adapters are found and how a blend is prepared."""

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

    def options(self) -> Any:
        from lora_diffusion.library.references import AdapterResolver
        from lora_diffusion.workflows.images.generate import LoadOptions

        return LoadOptions(
            resolver=AdapterResolver(library_folder=self.library),
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
    rest, region = extract_region(parts, source=f"--adapter {text}")
    return BlendEntry(path=path, weight=parse_weight(rest, source=f"--adapter {text}"), region=region)


def split_file(text: str) -> tuple[str, list[str]]:
    """A file and the parts after it: the longest that exists, as a path may have colons of its own, else up to the
    first that ends in a suffix, so that the mistake is found in the right half."""
    parts = text.split(":")
    heads = [":".join(parts[:count]) for count in range(len(parts), 0, -1)]
    path = next((head for head in heads if Path(head).exists()), None)
    path = path or next((head for head in reversed(heads) if Path(head).suffix), parts[0])
    return path, text[len(path) + 1 :].split(":") if len(text) > len(path) else []
