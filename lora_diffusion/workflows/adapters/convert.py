"""Adapters from one dialect into another, with what a change of precision cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter, cast_adapter
from lora_diffusion.algebra.metrics.quantization_error import rounding_error
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

WRITERS: Mapping[Dialect, Callable[[Adapter, Path], None]] = {
    "native": save_adapter,
    "kohya": save_kohya,
    "embedding": save_embedding,
}


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """A written file, and the rounding error."""

    source: Path
    output: Path
    rounding_error: float
    """Relative change of the deltas by rounding to the output dtype; 0 if the dtype stays the same."""


def convert(source: Path, output: Path, how: ConvertConfig) -> ConvertResult:
    """Read `source` in any dialect and write it to `output` in another.

    Raises OutputError if something is there already, AdapterFormatError, ConfigError for a type that cannot hold it.
    """
    card = output.with_suffix(".md")
    for path in (output, card) if how.card else (output,):
        check_output_free(path, force=how.force)
    adapter = load_adapter(source, ignore=how.ignore_unmatched)
    if how.without_tokens:
        adapter = replace(adapter, tokens={})
    if how.to == "embedding":
        adapter = replace(adapter, layers={}, biases={})
    if adapter.metadata.min_rank and how.to != "native":
        raise ConfigError(
            f"{source}: is a T-LoRA, which changes with the timestep, and {how.to} cannot say so; cut it to one rank "
            "with resize --first, or stay native"
        )
    rounded = adapter if how.dtype == "keep" else cast_adapter(adapter, torch_dtype(how.dtype))
    broken = rounded.non_finite
    if broken:
        raise ConfigError(f"{source}: {broken[0]} is beyond the range of {how.dtype}; choose bfloat16 or float32")
    WRITERS[how.to](rounded, output)
    if how.card:
        with atomic_file(card) as part:
            part.write_text(format_hub_card(rounded, output.name), encoding="utf-8")
    return ConvertResult(source=source, output=output, rounding_error=rounding_error(adapter, rounded))


def plan_outputs(sources: Sequence[Path], target: Path) -> list[Path]:
    """Return the output path of each file: `target` itself, or inside it for several files or a folder.

    Raises ConfigError if two would take the same name.
    """
    if len(sources) == 1 and not target.is_dir() and target.suffix == ".safetensors":
        return [target]
    outputs = [target / f"{source.stem}.safetensors" for source in sources]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise ConfigError(f"two of the files would become {twice}; convert them into different folders")
    if target.is_file() or (len(sources) == 1 and target.suffix not in ("", ".safetensors")):
        raise ConfigError(f"{target}: expected a folder, or one input and an output that ends in .safetensors")
    return outputs


def convert_files(sources: Sequence[Path], target: Path, how: ConvertConfig) -> list[ConvertResult]:
    """Convert files to `target`, or into it; stops at the first bad one. Raises LoRADiffusionError's children."""
    pairs = list(zip(sources, plan_outputs(sources, target), strict=True))
    return [convert(source, output, how) for source, output in tqdm(pairs, unit="file", disable=len(pairs) < 2)]
