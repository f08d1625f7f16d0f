"""Adapters out of checkpoints: what one has over another, or the low-rank part of one itself."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.compatibility import is_same_weight
from lora_diffusion.adapters.layers import FullLayer
from lora_diffusion.algebra.reduce.extract import (
    Approximation,
    Extraction,
    approximate_layers,
    check_finite_weights,
    extract_layers,
    frobenius_norm,
    subtract_weights,
)
from lora_diffusion.algebra.svd.randomized_svd import Sketch
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.architectures.targets import resolve_targets
from lora_diffusion.config.adapter_files import ExtractConfig, SVDMethod
from lora_diffusion.core.atomic_files import check_output
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.formats.checkpoints.diffusers import read_json
from lora_diffusion.models.locate import find_checkpoint

SKETCHES: Mapping[SVDMethod, Sketch | None] = {"exact": None, "randomized": Sketch()}


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Number of parameters of one kind, and the norm of their values."""

    count: int
    norm: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ExtractResult:
    """A written file, and the differences of the checkpoint that it does not hold."""

    tuned: str
    """The checkpoint that it is taken out of; empty where that is the base itself."""
    base: str
    output: Path
    how: ExtractConfig
    found: Extraction
    kept: Mapping[str, Tensor]
    """Differences of norms and biases in the file, by parameter."""
    left_out: Mapping[str, ParameterGroup]
    """What differs but is not in the file, by kind."""

    @property
    def left_out_norm(self) -> float:
        return hypot(*(group.norm for group in self.left_out.values()))

    @property
    def whole_norm(self) -> float:
        """Norm of all differences in UNet and text encoders."""
        return hypot(self.found.report.total.norm, self.left_out_norm, *map(frobenius_norm, self.kept.values()))

    @property
    def whole_error(self) -> float:
        """Norm of all differences that the file lacks over the norm of all differences."""
        return hypot(self.found.report.total.lost, self.left_out_norm) / self.whole_norm


def extract_file(tuned: str, base: str, output: Path, how: ExtractConfig) -> ExtractResult:
    """Write what a checkpoint has over a base as an adapter in the native layout.

    Both are `tiny-sd`, a folder, a single file or a hub id. One module is in memory at a time, beside the result. The
    VAE, which no adapter changes, is not looked at. Raises FamilyMismatchError if the two are not of one make,
    ConfigError if there is nothing to extract, OutputError if the output is in an input, or there already,
    BaseModelError.
    """
    first, second = find_checkpoint(base), find_checkpoint(tuned)
    check_output(output, (*list_files(first), *list_files(second)), force=how.force)
    check_same_architecture(first, second)
    names = select_names(first, how)
    pairs = ((parameter_module(n), first.parameters[n].read(), second.parameters[n].read()) for n in progress(names))
    found = extract_layers(pairs, make_approximation(how, list_stored_dtypes((first, second), names)))
    kept, left_out = split_kept_and_skipped(
        iterate_differences(first, second, remaining_parameters(first, names)), target_paths(first, how), how
    )
    if not found.layers and not kept:
        raise ConfigError(explain_no_difference(tuned, base, left_out))
    done = ExtractResult(tuned=tuned, base=base, output=output, how=how, found=found, kept=kept, left_out=left_out)
    metadata = AdapterMetadata(
        name=output.stem,
        family=first.family.name,
        variant=detect_variant(first),
        base_name=base,
        base_hash=first.hash,
        description=f"Extracted from {second.path.name}: what it has over its base, {how.rule}.",
        training={"extraction": {"tuned": tuned, "tuned_hash": second.hash, **make_record(done)}},
    )
    save_adapter(make_adapter(done, metadata), output)
    return done


def approximate_file(base: str, output: Path, how: ExtractConfig) -> ExtractResult:
    """Write the low-rank part of a base's own weights, which is no change to any base and not to be blended.

    The file is an adapter's in layout only: its family is `low-rank part of ...`, so that every command that would add
    it to a base refuses. Norms, biases and embeddings are left out. Raises as `extract_file` does.
    """
    source = find_checkpoint(base)
    check_output(output, list_files(source), force=how.force)
    names = select_names(source, how)
    weights = ((parameter_module(name), weight) for name, weight in iterate_values(source, progress(names)))
    found = approximate_layers(weights, make_approximation(how, list_stored_dtypes((source,), names)))
    if not found.layers:
        raise ConfigError(f"{base}: all weights at the targets are zero; there is nothing to approximate")
    _, left_out = split_kept_and_skipped(iterate_values(source, remaining_parameters(source, names)), (), how)
    done = ExtractResult(tuned="", base=base, output=output, how=how, found=found, kept={}, left_out=left_out)
    metadata = AdapterMetadata(
        name=f"low-rank part of {source.path.name}",
        family=f"low-rank part of {source.family.title}",
        base_name=base,
        base_hash=source.hash,
        description="The base's own weights at low rank, not a change to them: do not add it to a base.",
        training={"approximation": make_record(done)},
    )
    save_adapter(make_adapter(done, metadata), output)
    return done


def make_record(done: ExtractResult) -> dict[str, Any]:
    """Return the record of how the file was made, for its header."""
    how, total = done.how, done.found.report.total
    return {
        "rule": str(how.rule),
        "method": how.method,
        "unet_target_modules": list(how.unet_target_modules),
        "text_encoder_target_modules": list(how.text_encoder_target_modules),
        "relative_error": total.relative,
        "left_out": {kind: asdict(group) for kind, group in done.left_out.items()},
        "whole_error": done.whole_error,
    }


def list_files(checkpoint: Checkpoint) -> list[Path]:
    """List every file of a checkpoint."""
    return [p for p in checkpoint.path.rglob("*") if p.is_file()] if checkpoint.is_folder else [checkpoint.path]


def check_same_architecture(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise FamilyMismatchError unless both have the same parameters; a vocabulary may have grown."""
    if tuned.family is not base.family:
        raise FamilyMismatchError(
            f"{tuned.path} is {tuned.family.title}, but {base.path} is {base.family.title}; "
            "give the base that it was made of"
        )
    shapes, theirs = base.shapes, tuned.shapes
    for name in (*shapes, *(name for name in theirs if name not in shapes)):
        mine, other = shapes.get(name), theirs.get(name)
        if mine is None or other is None or not (is_same_weight(other, mine) or may_grow(name, mine, other)):
            raise FamilyMismatchError(
                f"{name} is {other or 'missing'} in {tuned.path}, but {mine or 'missing'} in {base.path}; "
                "give the base that it was made of"
            )


def may_grow(name: str, one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    return name.endswith(".token_embedding.weight") and one[1:] == two[1:]


def target_paths(checkpoint: Checkpoint, how: ExtractConfig) -> tuple[str, ...]:
    """Return the modules, norms included, that sets and patterns name. Raises ConfigError if one matches none."""
    paths = changeable_paths(checkpoint.layout)
    return resolve_targets(paths, unet=how.unet_target_modules, text_encoders=how.text_encoder_target_modules)


def select_names(checkpoint: Checkpoint, how: ExtractConfig) -> list[str]:
    """Select the weights that get a layer: those of two or four dimensions among the targets."""
    names = [f"{path}.weight" for path in target_paths(checkpoint, how)]
    return [name for name in names if name in checkpoint.parameters and len(checkpoint.shapes[name]) > 1]


def parameter_module(name: str) -> str:
    """Return the module of a parameter."""
    return name.rpartition(".")[0]


def progress(names: Sequence[str]) -> Iterable[str]:
    """Iterate over the names, with a progress bar on a terminal."""
    return tqdm(names, desc="extract", unit="module", leave=False, disable=None)


def list_stored_dtypes(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> set[str]:
    """List the types in which the weights are stored."""
    return {checkpoint.parameters[name].kind[0] for checkpoint in checkpoints for name in names}


def make_approximation(how: ExtractConfig, types: set[str]) -> Approximation:
    """Make the approximation settings. Raises ConfigError for a randomized method without a fixed rank."""
    kept = types.pop() if types in ({"float16"}, {"bfloat16"}) else "float32"
    dtype = torch_dtype(kept if how.dtype == "keep" else how.dtype)
    return Approximation(rule=how.rule, sketch=SKETCHES[how.method], dtype=dtype)


def remaining_parameters(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """Return the names of all other parameters."""
    taken = set(names)
    return [name for name in checkpoint.parameters if name not in taken]


def iterate_values(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters in float32, one at a time."""
    return ((name, checkpoint.parameters[name].read().float()) for name in names)


def iterate_differences(base: Checkpoint, tuned: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the difference of each parameter; rows that only one checkpoint has count in full."""
    for name in names:
        mine, other = base.parameters[name].read(), tuned.parameters[name].read()
        rows = min(len(mine), len(other))
        longer = max(mine, other, key=len)
        yield name, torch.cat([subtract_weights(mine[:rows], other[:rows]), longer[rows:].float()])


def split_kept_and_skipped(
    parameters: Iterable[tuple[str, Tensor]], targets: Sequence[str], how: ExtractConfig
) -> tuple[dict[str, Tensor], dict[str, ParameterGroup]]:
    """Split nonzero parameters into kept norms and biases, and all others grouped by kind.

    Raises BaseModelError for NaN or infinity.
    """
    kept: dict[str, Tensor] = {}
    norms: dict[str, list[float]] = {}
    for name, values in check_finite_weights(parameters):
        if not values.any():
            continue
        if how.norms_and_biases == "keep" and values.ndim == 1 and parameter_module(name) in targets:
            kept[name] = values
        else:
            norms.setdefault(parameter_kind(name, values), []).append(frobenius_norm(values))
    return kept, {kind: ParameterGroup(count=len(found), norm=hypot(*found)) for kind, found in norms.items()}


def parameter_kind(name: str, values: Tensor) -> str:
    if "_embedding.weight" in name:
        return "embeddings"
    if name.endswith(".bias"):
        return "biases"
    return "norm weights" if values.ndim == 1 else "modules beyond the targets"


def explain_no_difference(tuned: str, base: str, left_out: Mapping[str, ParameterGroup]) -> str:
    if not left_out:
        return f"{tuned}: nothing to extract; its UNet and text encoders are those of {base}"
    return (
        f"{tuned}: nothing to extract at the targets; only {format_groups(left_out)} differ from {base}; "
        "widen the targets, or keep norms and biases"
    )


def format_groups(left_out: Mapping[str, ParameterGroup]) -> str:
    """Format as `biases (2), norm weights (1)`."""
    return ", ".join(f"{kind} ({found.count})" for kind, found in left_out.items())


def detect_variant(base: Checkpoint) -> str:
    """Return `v-prediction` if a folder's scheduler says so; single files do not tell."""
    scheduler = base.path / "scheduler" / "scheduler_config.json"
    says = read_json(scheduler).get("prediction_type") if scheduler.is_file() else None
    return "v-prediction" if says == "v_prediction" else ""


def make_adapter(done: ExtractResult, metadata: AdapterMetadata) -> Adapter:
    norms = {
        parameter_module(name): FullLayer(diff=diff) for name, diff in done.kept.items() if name.endswith(".weight")
    }
    biases = {parameter_module(name): bias for name, bias in done.kept.items() if name.endswith(".bias")}
    return Adapter(layers={**done.found.layers, **norms}, biases=biases, metadata=metadata)
