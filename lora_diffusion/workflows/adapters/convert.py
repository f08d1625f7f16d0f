"""Conversion of adapter files from one format to another, with the error of a change of precision."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter, cast_adapter
from lora_diffusion.algebra.metrics.rounding_error import adapter_rounding_error
from lora_diffusion.config.adapter_files import ConvertConfig
from lora_diffusion.config.settings import Dialect
from lora_diffusion.core.atomic_files import atomic_file, check_output_free
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.kohya import save_kohya
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.adapters.textual_inversion import save_embedding
from lora_diffusion.workflows.adapters.hub_card import format_hub_card

_WRITERS: Mapping[Dialect, Callable[[Adapter, Path], None]] = {
    "native": save_adapter,
    "kohya": save_kohya,
    "embedding": save_embedding,
}


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """A converted adapter file."""

    source: Path
    """The file that was read."""
    output: Path
    """The file that was written."""
    rounding_error: float
    """Relative change of the deltas by rounding to the output dtype; 0 if the dtype stays the same."""


def convert(source: str | os.PathLike[str], output: str | os.PathLike[str], config: ConvertConfig) -> ConvertResult:
    """Convert an adapter file of any format.

    Args:
        source: The adapter file.
        output: The file to write. A model card is written beside it if the settings ask for one.
        config: Settings: format, dtype, and what is left out.

    Raises:
        OutputError: If a file exists without `config.force`, or cannot be written.
        AdapterFormatError: If the file cannot be read, or the other format cannot represent the adapter.
        ConfigError: If the dtype cannot represent a value, or a T-LoRA would become a plain LoRA.
    """
    source, output = Path(source), Path(output)
    card = output.with_suffix(".md")
    for path in (output, card) if config.card else (output,):
        check_output_free(path, force=config.force)
    adapter = load_adapter(source, ignore=config.ignore_unmatched)
    if config.without_tokens:
        adapter = replace(adapter, tokens={})
    if config.to == "embedding":
        adapter = replace(adapter, layers={}, biases={})
    if adapter.metadata.min_rank and config.to != "native":
        raise ConfigError(
            f"{source}: is a T-LoRA, whose rank depends on the timestep; the format {config.to} cannot represent this; "
            "give it a constant rank with `lora-diffusion resize --first`, or convert it to native"
        )
    rounded = adapter if config.dtype == "keep" else cast_adapter(adapter, torch_dtype(config.dtype))
    if rounded.non_finite:
        raise ConfigError(
            f"{source}: {rounded.non_finite[0]} is beyond the range of {config.dtype}; choose bfloat16 or float32"
        )
    _WRITERS[config.to](rounded, output)
    if config.card:
        with atomic_file(card) as part:
            part.write_text(format_hub_card(rounded, output.name), encoding="utf-8")
    return ConvertResult(source=source, output=output, rounding_error=adapter_rounding_error(adapter, rounded))


def _plan_outputs(sources: Sequence[Path], target: Path) -> list[Path]:
    """Return the output path of each file: `target` itself, or a path in it for several files or a folder."""
    if len(sources) == 1 and not target.is_dir() and target.suffix == ".safetensors":
        return [target]
    outputs = [target / f"{source.stem}.safetensors" for source in sources]
    if len(set(outputs)) < len(outputs):
        duplicate = next(path for path in outputs if outputs.count(path) > 1)
        raise ConfigError(f"{duplicate}: would be written for two of the files; convert them into different folders")
    if target.is_file() or (len(sources) == 1 and target.suffix not in ("", ".safetensors")):
        raise ConfigError(f"{target}: expected a folder, or one input and an output that ends in .safetensors")
    return outputs


def convert_files(
    sources: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str], config: ConvertConfig
) -> list[ConvertResult]:
    """Convert adapter files, and stop at the first one that fails.

    Args:
        sources: The adapter files.
        target: The .safetensors file to write for a single input, or the folder for several.
        config: Settings: format, dtype, and what is left out.

    Raises:
        LoRADiffusionError: If a file cannot be converted, or two would be written to the same path.
    """
    files = [Path(source) for source in sources]
    pairs = list(zip(files, _plan_outputs(files, Path(target)), strict=True))
    return [convert(source, output, config) for source, output in tqdm(pairs, unit="file", disable=len(pairs) < 2)]
